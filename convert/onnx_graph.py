"""One PyTorch module to one ONNX graph, through TorchScript: trace, save, load, export, compare with PyTorch.

The graph has a dynamic batch axis and is run beside PyTorch on random input of another batch size than it was traced
with; above the tolerance no graph is left behind. The TorchScript exporter is used (`dynamo=False`): it takes a saved
TorchScript file, which the newer exporter does not.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import nn

OPSET = 17
TOLERANCE = 1e-3


class Exported(NamedTuple):
    """A graph that was written, and its largest absolute difference from PyTorch on random input."""

    path: Path
    error: float


def export_graph(
    module: nn.Module | str | os.PathLike,
    example: torch.Tensor,
    out: str | os.PathLike,
    *,
    input_name: str = "pixels",
    output_name: str = "output",
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes one module (or saved TorchScript file) with one input and one output as an ONNX graph at `out`.

    example: an input [B, ...] the module takes; the graph is compared with PyTorch on B + 1 rows. Raises ValueError if
    they differ by more than tolerance * max(1, largest output).
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if isinstance(module, nn.Module):
            script = trace(module, example, Path(scratch))
        else:
            script = module = load_script(module)
        graph = Path(scratch) / out.name
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracer remarks on constant shapes: the comparison below is the check
            torch.onnx.export(
                script,
                (example,),
                str(graph),
                input_names=[input_name],
                output_names=[output_name],
                dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
        error = compare(module, graph, another_batch(example), tolerance)
        for file in Path(scratch).glob(out.stem + ".onnx*"):
            shutil.move(file, out.with_name(file.name))
    print(f"{out}: largest difference from PyTorch {error:.2e}")
    return Exported(out, error)


def trace(module: nn.Module, example: torch.Tensor, scratch: Path) -> torch.jit.ScriptModule:
    """`module` traced in eval mode, saved as TorchScript and loaded back: what is exported is what a .ts file holds."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module.eval(), (example,), check_trace=False).save(str(scratch / "traced.ts"))
    return load_script(scratch / "traced.ts")


def load_script(path: str | os.PathLike) -> torch.jit.ScriptModule:
    """A TorchScript file on the CPU in eval mode; raises ValueError if it is a pickled state dict or anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not a TorchScript file ({' '.join(str(error).split())[:200]}); "
            "save it with torch.jit.trace(module, example).save(path)"
        ) from error


def another_batch(example: torch.Tensor) -> torch.Tensor:
    """Random input like `example` with one row more: a graph that froze its batch size fails on it."""
    more = torch.cat([example, example[:1]])
    if more.is_floating_point():
        return torch.rand(more.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return more.roll(1, 0)


def compare(module: nn.Module, graph: Path, inputs: torch.Tensor, tolerance: float) -> float:
    """Largest absolute difference between PyTorch and ONNX Runtime; raises ValueError above the tolerance."""
    with torch.no_grad():
        expected = module(inputs).double().numpy()
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0].astype(np.float64)
    error = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"{graph.name}: ONNX gives {list(found.shape)}, PyTorch {list(expected.shape)}, largest difference "
            f"{error:.2e}: above {tolerance:.0e}, so no graph was written"
        )
    return error


def source_of(path: str | os.PathLike) -> dict[str, str]:
    """Name and sha256 of the file a graph was made from."""
    return {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def exporter(error: float) -> dict[str, Any]:
    """What wrote a graph, and how far it was from PyTorch."""
    return {"torch": torch.__version__, "route": "TorchScript", "opset": OPSET, "largest_difference": error}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` as indented JSON, numbers in full."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
