"""The cost of fresh crops in every pass: encoding an image, against training on it; reading it; its latents on disk.

    python -m benchmarks.encoding [--profiles lite,moderate,standard]

FLOP are counted by PyTorch in diffusers' models, in Stable Diffusion 1.5's sizes and without weights, at 512x512: for
one image, or one sample of a training step. They hold on every device. Seconds are of this machine, for one image or
sample: the emoji world's encoder and training step (batches of 16), SD1.5's encoder at 512x512 with random weights, and
reading a photograph of COCO's size. Bytes are those of a file of latents.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import side_by_side
from benchmarks.models import CONFIGS

SIDE, LATENTS, PASS = 512, (64, 64, 4), 5000
PHOTOGRAPH = (480, 640)  # height and width
STEPS, SAMPLES, BATCH = 8, 512, 16


def flop(profiles: list[str]) -> dict[str, float]:
    """FLOP of one image: of encoding it, and of a training step under each profile."""
    import diffusers
    import torch

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**CONFIGS["sd15"]["vae"], latent_channels=LATENTS[2]).requires_grad_(False)
        image, latents = torch.empty(1, 3, SIDE, SIDE), torch.empty(1, LATENTS[2], *LATENTS[:2])
        inputs = latents, torch.empty(1, dtype=torch.long), torch.empty(1, 77, 768)
        unets = {profile: trained(profile) for profile in profiles}
    steps = {profile: counted(lambda u=u: u(*inputs).sample.sum().backward()) for profile, u in unets.items()}
    return {"encoding": counted(lambda: vae.encode(image)), **steps}


def trained(profile: str) -> Any:
    """diffusers' UNet of SD1.5, with the gradients that a profile needs."""
    import diffusers
    import peft

    unet = diffusers.UNet2DConditionModel(**CONFIGS["sd15"]["unet"]).requires_grad_(profile == "standard")
    if profile == "lite":
        unet.add_adapter(peft.LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, module in unet.named_modules() if profile == "moderate" else ():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out")):
            module.requires_grad_(True)
    return unet


def counted(work: Callable[[], Any]) -> float:
    """FLOP of a call, by PyTorch's count: two for a multiplication and an addition."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def seconds(profiles: list[str]) -> dict[str, float]:
    """Seconds of one image or sample on this machine."""
    import convert
    from spqr_jax import mini
    from spqr_jax.training import latents

    pipeline, dataset = convert.load(mini.model_path()), mini.dataset("general", SAMPLES, 0)
    found = {"emoji world: encoding": timed(lambda: latents.encode(pipeline, dataset)) / SAMPLES}
    for profile in profiles:
        found[f"emoji world: {profile}"] = step(pipeline, dataset, profile) / BATCH
    return found | {"SD1.5: encoding": full_encoder(), "reading a photograph": reading()}


def step(pipeline: Any, dataset: Any, profile: str) -> float:
    """Median seconds of a training step, the first two left out."""
    from spqr_jax import finetune

    at: list[float] = []
    finetune.train(
        pipeline, dataset, profile, steps=STEPS, batch_size=BATCH, on_step=lambda _: at.append(time.perf_counter())
    )
    return statistics.median(np.diff(at)[1:])


def full_encoder() -> float:
    """Seconds in which SD1.5's VAE encodes one image."""
    import jax

    from spqr_jax import backbones
    from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
    from spqr_jax.training import latents

    definition, shapes = backbones.define("vae", CONFIGS["sd15"]["vae"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    images = rng.integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    return timed(lambda: jax.block_until_ready(latents.encode_batch(STABLE_DIFFUSION, definition, params, images)))


def reading(count: int = 64) -> float:
    """Seconds in which a JPEG is decoded, resized and cropped, several at a time."""
    from PIL import Image

    from spqr_jax import data

    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            grey = np.random.default_rng(i).integers(0, 256, (PHOTOGRAPH[0] // 8, PHOTOGRAPH[1] // 8, 3), np.uint8)
            image = Image.fromarray(grey).resize(PHOTOGRAPH[::-1], Image.Resampling.BICUBIC)
            image.save(Path(folder) / f"{i}.jpg", quality=90)
            (Path(folder) / f"{i}.txt").write_text("a photograph")
        drawn = data.load(f"folder:{folder}", count, side=SIDE, crop="random")
        return timed(lambda: drawn.images(np.arange(count))) / count


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the second call."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bytes_of_a_pass(count: int = 256) -> int:
    """Bytes in which the latents of PASS images lie on disk, from a file of `count`."""
    from spqr_jax.files import storage

    with tempfile.TemporaryDirectory() as folder:
        zeros = np.zeros((count, *LATENTS), np.float32)
        storage.write_npz(Path(folder) / "block.npz", mean=zeros, logvar=zeros)
        return (Path(folder) / "block.npz").stat().st_size * PASS // count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="lite,moderate,standard", help="of the training steps")
    profiles = parser.parse_args().profiles.split(",")
    counts = flop(profiles)
    rows = [
        {"one image": name, "TFLOP": n / 1e12, "encoding / this": counts["encoding"] / n} for name, n in counts.items()
    ]
    print(side_by_side.markdown(rows))
    print(side_by_side.markdown([{"one image": name, "ms": 1e3 * s} for name, s in seconds(profiles).items()]))
    print(f"{PASS} images of {SIDE}x{SIDE}: {bytes_of_a_pass() / 1e6:.0f} MB a pass")


if __name__ == "__main__":
    main()
