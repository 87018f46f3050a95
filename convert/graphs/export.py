"""The command `python -m convert judges`: judges in PyTorch to ONNX graphs.

    python -m convert judges --kind clip        CLIP_DIRECTORY   --out DIR
    python -m convert judges --kind q16         CLIP_DIRECTORY   --out DIR --prompts prompts.p
    python -m convert judges --kind inception   pt_inception.pth --out DIR
    python -m convert judges --kind torchscript judge.ts         --out DIR --sidecar judge.json
    python -m convert judges --kind llavaguard  LLAVA_DIRECTORY  --out DIR

Every source is a local file or directory. Every graph is compared with PyTorch, and the largest difference is printed;
above the tolerance no graph is left behind (see `convert.graphs.graph`).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert.graphs.clip import export_clip, export_q16
from convert.graphs.graph import Exported, export_graph, exporter, source_of, write_json
from judges.session import JudgeError


class SmallConvNet(nn.Module):
    """The judge of the emoji world: float [N, 3, H, W] in [-1, 1] -> logits [N, n_labels].

    Six 3x3 convolutions (3-32-32-64-64-128-128, every second one with stride 2), each with GroupNorm of 8 groups and
    SiLU; global average; linear head. Parameter names: convs.0..5, norms.0..5, head.
    """

    def __init__(self, n_labels: int):
        super().__init__()
        widths = (3, 32, 32, 64, 64, 128, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + i % 2, padding=1) for i in range(len(widths) - 1)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width, eps=1e-5) for width in widths[1:])
        self.head = nn.Linear(widths[-1], n_labels)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] -> pooled features [N, 128]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            pixels = nn.functional.silu(norm(conv(pixels)))
        return pixels.mean(dim=(2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] -> logits [N, n_labels]."""
        return self.head(self.features(pixels))


class Calls(nn.Module):
    """A module whose forward is a method of another module, so that this method can be traced."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: torch.Tensor) -> Any:
        return getattr(self.module, self.method)(*inputs)


def export_torchscript(
    module: nn.Module | str | os.PathLike, example: torch.Tensor, out: str | os.PathLike, sidecar: dict[str, Any]
) -> Exported:
    """Exports a module or TorchScript file to `out` (.onnx), with `sidecar` beside it as .json.

    sidecar: see judges.classifier and judges.inception. It names input and output, default "pixels" and "output".
    """
    names = {"name": "pixels"} | sidecar.get("input", {}), {"name": "output"} | sidecar.get("output", {})
    exported = export_graph(module, example, out, input_name=names[0]["name"], output_name=names[1]["name"])
    source = {"source": source_of(module)} if isinstance(module, (str, os.PathLike)) else {}
    record = sidecar | {"input": names[0], "output": names[1]} | source | {"exporter": exporter(exported.error)}
    write_json(Path(out).with_suffix(".json"), record)
    return exported


def cached_torchscript(source: str | os.PathLike, sidecar: dict[str, Any], cache: str | os.PathLike) -> Path:
    """The ONNX graph of a TorchScript file, exported once. Its name in `cache` holds the hash of file and sidecar."""
    digest = hashlib.sha256(Path(source).read_bytes() + json.dumps(sidecar, sort_keys=True).encode()).hexdigest()
    out = Path(cache) / f"{Path(source).stem}-{digest[:16]}.onnx"
    if not (out.is_file() and out.with_suffix(".json").is_file()):
        export_torchscript(source, example_pixels(sidecar), out, sidecar)
    return out


def example_pixels(sidecar: dict[str, Any]) -> torch.Tensor:
    """Random input [2, 3, h, w] or [2, h, w, 3], of the size and layout in a sidecar's `input`."""
    spec = sidecar.get("input", {})
    height, width = spec.get("size") or (64, 64)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return pixels if spec.get("layout", "NCHW") == "NCHW" else pixels.permute(0, 2, 3, 1).contiguous()


def export_small_conv_net(
    state_dict_path: str | os.PathLike,
    labels: Sequence[str],
    out_dir: str | os.PathLike,
    *,
    unsafe: Sequence[str] = (),
    threshold: float = 0.5,
    features: bool = False,
    name: str | None = None,
    model: str = "SmallConvNet",
) -> Exported:
    """Exports a trained SmallConvNet (torch names, .safetensors) as out_dir/<name>.onnx with its sidecar.

    features=False: the graph gives logits, for judges.classifier.Classifier; its name is "judge". unsafe: its unsafe
    labels.
    features=True: the graph gives pooled features [N, 128], for judges.inception.Inception in mode native; its name is
    "features".
    """
    from safetensors.torch import load_file

    net = SmallConvNet(len(labels))
    net.load_state_dict(load_file(str(state_dict_path)))
    half = [0.5, 0.5, 0.5]
    spec = {
        "name": "pixels",
        "size": [32, 32],
        "resize": "bilinear_antialias",
        "layout": "NCHW",
        "mean": half,
        "std": half,
    }
    sidecar: dict[str, Any] = {"model": model, "input": spec}
    if features:
        sidecar |= {"kind": "features", "mode": "native", "output": {"name": "features"}}
    else:
        sidecar |= {"kind": "classifier", "output": {"name": "logits", "activation": "softmax"}}
        sidecar |= {"labels": list(labels), "unsafe": list(unsafe), "rule": "sum", "threshold": threshold}
    out = Path(out_dir) / f"{name or ('features' if features else 'judge')}.onnx"
    module = Calls(net, "features") if features else net
    return export_torchscript(module, example_pixels(sidecar), out, sidecar)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit status 2, with one line of explanation, for a source that cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m convert judges", description="judges in PyTorch to ONNX graphs")
    parser.add_argument("source", help="local file or directory")
    parser.add_argument("--kind", required=True, choices=("clip", "q16", "inception", "torchscript", "llavaguard"))
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--prompts", help="q16: prompts.p learned for this CLIP")
    parser.add_argument("--sidecar", help="torchscript: JSON description of the judge (see docs/judges.md)")
    parser.add_argument("--model", help="name to record (default: the source's)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="llavaguard: type of the graphs"
    )
    flags = parser.parse_args(argv)
    needs = {"q16": "prompts", "torchscript": "sidecar"}.get(flags.kind)
    if needs and not getattr(flags, needs):
        parser.error(f"--kind {flags.kind} needs --{needs}")
    if not Path(flags.source).exists():
        parser.error(f"{flags.source}: no such file or directory")
    try:
        run(flags)
    except (OSError, ValueError, JudgeError) as error:
        parser.error(str(error))


def run(flags: argparse.Namespace) -> None:
    """Carries out one parsed command."""
    if flags.kind == "clip":
        export_clip(flags.source, flags.out, model=flags.model)
    elif flags.kind == "q16":
        export_q16(flags.source, flags.prompts, flags.out, model=flags.model)
    elif flags.kind == "inception":
        from convert.graphs.inception import export_inception

        export_inception(flags.source, flags.out)
    elif flags.kind == "llavaguard":
        from convert.graphs.llavaguard import export_llavaguard

        export_llavaguard(flags.source, flags.out, dtype=flags.dtype)
    else:
        sidecar = json.loads(Path(flags.sidecar).read_text(encoding="utf-8"))
        out = Path(flags.out) / f"{Path(flags.source).stem}.onnx"
        export_torchscript(flags.source, example_pixels(sidecar), out, sidecar)


if __name__ == "__main__":
    main()
