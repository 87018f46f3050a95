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
NUMPY_ONLY = [f"spqr_jax/score/{name}.py" for name in ("__init__", "stats", "sign_flips", "seeds")]

# The layers of the house: what stands in one may import what stands in those before it, and its own room. Rooms are
# packages or single modules of spqr_jax, and the other top-level packages. An import inside a function counts too.
LAYERS = (
    ("judges",),
    ("config", "params", "devices", "schedulers", "data"),
    ("files", "pipeline", "prompts", "concepts", "protocols"),
    ("backbones", "score"),
    ("training", "profiles", "convert", "mini", "report"),
    ("sampling", "finetune", "configs"),
    ("generate",),
    ("methods",),
    ("attacks",),
    ("run",),
    ("fit", "submission"),
    ("board",),
    ("launch", "benchmarks", "recipe"),
)
LAYER = {room: number for number, layer in enumerate(LAYERS, 1) for room in layer}
FOLDERS = ("spqr_jax", "judges", "convert", "configs", "benchmarks")


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


def name_of(path: Path) -> str:
    """The dotted name of a file of the project."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for folder in FOLDERS for path in files(folder)} | {"launch": ROOT / "launch.py"}


def room_of(module: str) -> str:
    """The room that a module stands in; a room's command (`python -m`) stands on top, beside launch.py."""
    if module.endswith(".__main__"):
        return "launch"
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "spqr_jax" else first


def targets(path: Path) -> set[str]:
    """The modules of the project that a file imports: a name imported from a module counts as that module."""
    found = set()
    for name in imported(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != "spqr_jax":
            found.add(name)
    return found


def test_every_room_stands_in_a_layer():
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms == set(LAYER)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"spqr_jax"}))
def test_imports_lead_downwards(module):
    """The layers above, lazy imports included. What only type checkers import counts as well."""
    room = room_of(module)
    wrong = {
        target
        for target in targets(MODULES[module])
        if room_of(target) != room and LAYER[room_of(target)] >= LAYER[room]
    }
    assert not wrong, f"{module} (layer {LAYER[room]}) imports {sorted(wrong)}"


def test_no_circle():
    """Files can be put in an order in which each imports only earlier ones."""
    left = {module: targets(path) - {module} for module, path in MODULES.items()}
    while free := {module for module, needs in left.items() if not needs & set(left)}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"a circle within {sorted(left)}"


def test_few_modules_lie_flat():
    assert len(list((ROOT / "spqr_jax").glob("*.py"))) <= 14


def test_every_room_says_what_it_is_for():
    """Two or three sentences in every __init__ of the package."""
    for path in files("spqr_jax"):
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(text) > 80, f"{path}: say what the room is for and what it may know"


def test_few_files_name_the_unet():
    """What a component is called is the backbone's knowledge."""
    naming = [path for path in files("spqr_jax") if '"unet"' in path.read_text(encoding="utf-8")]
    assert len(naming) <= 10, naming


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
