"""One program compiled for a target: its memory, its FLOP, the compiler's time, or the reason why there is none.

Results are kept under the hash of the lowered program, so that the same question is answered at once.
"""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jaxlib

from spqr_jax.files import storage
from spqr_jax.fit import flop
from spqr_jax.fit.programs import Program
from spqr_jax.fit.targets import Target

CACHE = Path("~/.cache/spqr_jax/fit")
# The GPU compiler's Triton kernels for some products are chosen by trying them on the device.
NO_TILES, WITHOUT_TRITON = "Couldn't find output tile sizes", {"xla_gpu_enable_triton_gemm": False}
FIELDS = ("argument", "output", "temp", "alias")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How compilers say what a program would take: libtpu, twice, and the GPU compiler's rematerialisation.
NEEDED = (
    r"total memory required for [\w ]+\(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of",
)


class Measured(NamedTuple):
    """What a compiler said about one program. Bytes are those on one device.

    Attributes:
        compiles: whether it compiled. A compiler of a TPU refuses a program that takes more memory than there is.
        bytes: arguments, outputs and temporaries, aliased ones once; what the compiler says it would need if it refused
            the program for its memory; None if it does not say.
        parts: bytes of "arguments", "outputs", "temporaries" and "aliased".
        flops: FLOP on one device, counted in the program as a CPU computes it (`flop.flop`).
        compiler_flops: the compiler's own count, where there is one. A loop counts once there.
        compile_s: seconds in the compiler.
        reason: why it did not compile; "" if it did.
        note: what the compiler had to be told; "" if nothing.
        cached: whether this was known from an earlier time.
    """

    compiles: bool
    bytes: int | None
    parts: dict[str, int]
    flops: float
    compiler_flops: float | None
    compile_s: float
    reason: str
    note: str = ""
    cached: bool = False

    def memory_analysis(self) -> Any:
        """As that of jax.stages.Compiled, for `spqr_jax.sampling.batch_size`. Raises as a compiler without memory."""
        if self.bytes is None:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.reason}")
        sizes = dict.fromkeys((f"{field}_size_in_bytes" for field in FIELDS), 0)
        return SimpleNamespace(**sizes | {"temp_size_in_bytes": self.bytes})


def measure(program: Program, plain: Program, target: Target, cache: Path | None = None) -> Measured:
    """Trace, lower and compile a program.

    plain: the same program as a CPU computes it, without kernels whose FLOP cannot be seen; they are counted there.
    cache: a directory of earlier results, or None. What a layer or a compiler raises is the reason in the result.
    """
    count = 0.0
    try:
        count = flop.flop(plain.trace().jaxpr.jaxpr) / program.devices
        lowered = program.trace().lower()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return _refused(error, count, 0.0)
    file = cache / f"{_key(lowered, target)}.json" if cache else None
    if file and file.exists():
        return Measured(**json.loads(file.read_text(encoding="utf-8")))._replace(cached=True)
    measured = _compiled(lowered, count)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(file, json.dumps(measured._asdict(), indent=2) + "\n")
    return measured


def _compile(lowered: Any) -> tuple[Any, str]:
    """The compiled program, and what was done for it. Raises as the compiler."""
    try:
        return lowered.compile(), ""
    except RuntimeError as error:
        if NO_TILES not in str(error):
            raise
    return lowered.compile(WITHOUT_TRITON), "compiled with xla_gpu_enable_triton_gemm=false, as no device is there"


def _compiled(lowered: Any, count: float) -> Measured:
    start = time.perf_counter()
    try:
        compiled, note = _compile(lowered)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        return _refused(error, count, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = {field: int(getattr(memory, f"{field}_size_in_bytes")) for field in FIELDS}
    total = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    parts = dict(zip(("arguments", "outputs", "temporaries", "aliased"), sizes.values(), strict=True))
    return Measured(True, total, parts, count, cost.get("flops"), round(seconds, 1), "", note)


def _refused(error: Exception, count: float, seconds: float) -> Measured:
    """The result for a program that does not compile."""
    message = str(error)
    needed = next((found for pattern in NEEDED if (found := re.search(pattern, message))), None)
    total = int(float(needed[1]) * UNITS[needed[2]]) if needed else None
    lines = message.strip().splitlines() or ["no message"]
    return Measured(False, total, {}, count, None, round(seconds, 1), f"{type(error).__name__}: {lines[0][:400]}")


def _key(lowered: Any, target: Target) -> str:
    """A hash of the program, the target, the compilers and their flags."""
    versions = (jax.__version__, jaxlib.__version__, _compiler(target), os.environ.get("XLA_FLAGS", ""))
    text = repr((target.name, target.topology, versions)) + lowered.as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compiler(target: Target) -> str:
    """Version of the compiler's own package, where it has one."""
    from importlib.metadata import PackageNotFoundError, version

    for name in {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin")}.get(target.platform, ()):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""
