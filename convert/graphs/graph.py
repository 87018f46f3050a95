"""One PyTorch module to one ONNX graph, through TorchScript: trace, save, load, export, compare with PyTorch.

The graph has a dynamic batch axis. It is compared with PyTorch on random input of another batch size than it was traced
with; above the tolerance no graph is left behind. The TorchScript exporter is used (`dynamo=False`), since the newer
one does not take a saved TorchScript file.
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
Axes = dict[str, dict[int, str]]


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
    """Writes a module or saved TorchScript file with one input and one output as an ONNX graph at `out`.

    example: an input [B, ...] of the module. The graph is compared with PyTorch on B + 1 rows. Raises ValueError if
    they differ by more than tolerance * max(1, largest output).
    """
    axes = {input_name: {0: "batch"}}, {output_name: {0: "batch"}}
    return export_checked(module, (example,), (another_batch(example),), out, *axes, tolerance=tolerance)


def export_checked(
    module: nn.Module | str | os.PathLike,
    examples: tuple[torch.Tensor, ...],
    others: tuple[torch.Tensor, ...],
    out: str | os.PathLike,
    inputs: Axes,
    outputs: Axes,
    *,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a graph that is traced on `examples` and compared with PyTorch on `others`.

    The two should differ in the length of every dynamic axis. inputs, outputs: name -> {dynamic axis: its label}, in
    the order of the module's inputs and outputs. Raises ValueError as `export_graph`.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if isinstance(module, nn.Module):
            script = trace(module, examples, Path(scratch))
        else:
            script = module = load_script(module)
        graph = Path(scratch) / out.name
        write_graph(script, examples, graph, inputs, outputs)
        error = compare(module, graph, others, tolerance)
        for file in Path(scratch).glob(out.stem + ".onnx*"):
            shutil.move(file, out.with_name(file.name))
    print(f"{out}: largest difference from PyTorch {error:.2e}")
    return Exported(out, error)


def write_graph(
    script: torch.jit.ScriptModule, examples: tuple[torch.Tensor, ...], graph: Path, inputs: Axes, outputs: Axes
) -> None:
    """Writes the ONNX graph of a TorchScript module, and its external data, if any, in one file beside it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of constant shapes, which the comparison checks
        torch.onnx.export(
            script,
            examples,
            str(graph),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=inputs | outputs,
            opset_version=OPSET,
            dynamo=False,
        )
    gather_external(graph)


def gather_external(graph: Path) -> None:
    """Joins the many data files of a graph above 2 GiB into one file, under the name that judges expect."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    if not any(uses_external_data(tensor) for tensor in onnx.load(graph, load_external_data=False).graph.initializer):
        return
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location=graph.name + "_data")


def trace(module: nn.Module, examples: tuple[torch.Tensor, ...], scratch: Path) -> torch.jit.ScriptModule:
    """`module` traced in eval mode, saved as TorchScript and loaded again, as users' files are."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module.eval(), examples, check_trace=False).save(str(scratch / "traced.ts"))
    return load_script(scratch / "traced.ts")


def load_script(path: str | os.PathLike) -> torch.jit.ScriptModule:
    """The module in a TorchScript file, on the CPU in eval mode. Raises ValueError for another file."""
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
    """Random input like `example` with one row more, on which a graph with a fixed batch size fails."""
    more = torch.cat([example, example[:1]])
    if more.is_floating_point():
        noise = torch.rand(more.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return noise.to(more.dtype)
    return more.roll(1, 0)


def compare(module: nn.Module, graph: Path, inputs: tuple[torch.Tensor, ...], tolerance: float) -> float:
    """The largest absolute difference between PyTorch and ONNX Runtime. Raises ValueError above the tolerance."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(difference(a.double().numpy(), b, graph.name, tolerance) for a, b in zip(expected, found, strict=True))


def difference(expected: np.ndarray, found: np.ndarray, name: str, tolerance: float) -> float:
    """The largest absolute difference of one output. Raises ValueError above the tolerance or for unequal shapes."""
    same = found.shape == expected.shape
    error = float(np.abs(found.astype(np.float64) - expected).max()) if same else float("inf")
    if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"{name}: ONNX gives {list(found.shape)}, PyTorch {list(expected.shape)}, largest difference {error:.2e}: "
            f"above {tolerance:.0e}, so no graph was written"
        )
    return error


def source_of(path: str | os.PathLike) -> dict[str, str]:
    """Name and sha256 of the file a graph was made from."""
    return {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def exporter(error: float) -> dict[str, Any]:
    """How a graph was exported, for its sidecar: versions, route, and the largest difference from PyTorch."""
    return {"torch": torch.__version__, "route": "TorchScript", "opset": OPSET, "largest_difference": error}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` as indented JSON, numbers in full."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
