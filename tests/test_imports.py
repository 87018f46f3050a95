"""Who may import what: read from the source, and tried in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
# cv2 and nudenet are optional; nudenet is only asked where its package lies, for the graph inside it.
JUDGES = {"judges", "numpy", "onnxruntime", "PIL", "cv2", "tokenizers"}
NUMPY_ONLY = ["spqr_jax/score/__init__.py", "spqr_jax/score/stats.py"]


def imported(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no Python files"
    return found


@pytest.mark.parametrize("path", files("spqr_jax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_spqr_jax_never_imports_torch(path):
    assert not top(imported(path)) & {"torch", "torchvision", "peft", "accelerate"}


@pytest.mark.parametrize("path", files("judges"), ids=lambda p: str(p.relative_to(ROOT)))
def test_judges_need_numpy_and_onnxruntime_only(path):
    assert top(imported(path)) - STANDARD <= JUDGES


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_scores_need_numpy_only(name):
    names = imported(ROOT / name)
    assert top(names) - STANDARD <= {"numpy", "spqr_jax"}
    # Within the package they may use each other, never a module that brings JAX.
    assert all(n.split(".")[1] in ("score", "stats") for n in names if n.startswith("spqr_jax."))


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
for module in {modules!r}:
    __import__(module)
"""


@pytest.mark.parametrize(
    ("blocked", "modules"),
    [
        (
            ["jax", "flax", "torch", "transformers", "spqr_jax.backbones.models"],
            ["spqr_jax.score", "spqr_jax.score.stats"],
        ),
        (["jax", "flax", "torch", "transformers", "spqr_jax"], ["judges"]),
        (["torch"], ["spqr_jax.generate", "spqr_jax.finetune", "spqr_jax.training.lora", "convert"]),
    ],
)
def test_imports_work_without_what_they_may_not_need(blocked, modules):
    """Also what comes in through other modules: the forbidden packages cannot be imported at all here."""
    script = BLOCKED.format(blocked=blocked, modules=modules)
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
