"""A part of the tests again, as on processors with fewer instructions: each library chooses its code by the processor.

No variable or session option limits ONNX Runtime on a CPU, so that the judges are not part of this.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="names of x86 instruction sets"),
]
pytest.importorskip("torch")
pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/schedulers",
    "tests/score/test_score.py",
    "tests/score/test_stats.py",
    "tests/parity/test_generate.py::test_whole_sample[sd1-pndm]",
    "tests/parity/test_generate.py::test_whole_sample[sd1-dpmpp]",
]
# NumPy warns of a name that it was not built with, and of one that this processor lacks.
NUMPY = {"NPY_DISABLE_CPU_FEATURES": " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))}
BLAS = {"OPENBLAS_CORETYPE": "Nehalem"}  # NumPy's matrix products and decompositions
LIBM = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4"}  # the functions of Python's math
SETTINGS = {
    "pytorch default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "pytorch avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "numpy baseline": NUMPY | BLAS | LIBM,
    "xla avx2": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"},
    "xla sse4.2": {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"},
}
SETTINGS["all"] = SETTINGS["pytorch default"] | SETTINGS["numpy baseline"] | SETTINGS["xla sse4.2"]
each_setting = pytest.mark.parametrize("setting", SETTINGS)

FOUND = """
import json, sys
import jax, numpy as np, torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from spqr_jax.sampling import noise
np.save(sys.argv[1], noise.of_each(np.arange(64, dtype=np.uint32), (8, 8, 16)))
print(json.dumps({
    "pytorch": torch.backends.cpu.get_cpu_capability(),
    "numpy": [name for name in __cpu_dispatch__ if __cpu_features__[name]],
    "bits": np.asarray(jax.random.bits(jax.random.key(7), (4,))).tolist(),
}))
"""


def python(setting: str, folder: Path, *arguments: str) -> str:
    """What `python ARGUMENTS` prints, with the variables of a setting and programs compiled for it alone."""
    env = os.environ | SETTINGS.get(setting, {}) | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    env.pop("PYTEST_ADDOPTS", None)
    own, added = os.environ["XLA_FLAGS"], SETTINGS.get(setting, {}).get("XLA_FLAGS", "")  # the first: tests/conftest.py
    env["XLA_FLAGS"] = f"{own} {added}"
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> np.ndarray:
    """Noise drawn without any limit, float32 [64, 8, 8, 16]."""
    folder = tmp_path_factory.mktemp("here")
    python("", folder, "-c", FOUND, str(folder / "noise.npy"))
    return np.load(folder / "noise.npy")


@each_setting
def test_random_bits_are_equal_and_normal_draws_nearly(setting, here, tmp_path):
    found = json.loads(python(setting, tmp_path, "-c", FOUND, str(tmp_path / "noise.npy")))
    wanted = SETTINGS[setting]
    if "ATEN_CPU_CAPABILITY" in wanted:
        assert found["pytorch"].lower() == wanted["ATEN_CPU_CAPABILITY"]
    if "NPY_DISABLE_CPU_FEATURES" in wanted:
        assert not found["numpy"]
    assert found["bits"] == [2895194379, 4185947648, 1300703658, 1906787632]
    np.testing.assert_allclose(np.load(tmp_path / "noise.npy"), here, rtol=0, atol=2e-6)


@each_setting
def test_tests_pass(setting, tmp_path):
    out = python(setting, tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *TESTS)
    assert " passed" in out and "failed" not in out
