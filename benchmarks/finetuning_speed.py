"""Fine-tuning against diffusers' training scripts on PyTorch (PEFT for LoRA, fused AdamW), in turn on one machine.

    python -m benchmarks.finetuning_speed --model mini
    python -m benchmarks.finetuning_speed --model sd15 --apart [--profiles lite,moderate,standard]

For every profile: seconds a training step, both sides on latents and text states that are there; then a whole
fine-tuning of the same number of samples from images and captions, where the scripts encode every batch and ours
encodes every image once; and peak memory of each. sd15 has random weights in the full SD1.5 config and trains at
256x256, one sample a step. Sides: ours; diffusers eager; its UNet and VAE in channels-last layout.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import models, side_by_side
from benchmarks.models import Workload
from benchmarks.side_by_side import Prepared, Side, Timed

PROFILES = ("lite", "moderate", "standard")
STEP, WHOLE = "step", "whole fine-tuning"


class Amount(NamedTuple):
    """Timed steps a turn; samples and passes over them in a whole fine-tuning."""

    steps: int
    samples: int
    epochs: int


AMOUNTS = {"tiny": Amount(3, 16, 2), "mini": Amount(10, 128, 4), "sd15": Amount(2, 4, 2)}


def data(workload: Workload, count: int) -> tuple[np.ndarray, list[str]]:
    """(images_u8 [N, side, side, 3], captions): the emoji world's images, enlarged where the model's are larger."""
    from spqr_jax import mini

    examples = mini.dataset("general", count, 0)
    images = examples.images(np.arange(count))
    scale = workload.training_side // images.shape[1]
    return images.repeat(scale, axis=1).repeat(scale, axis=2), list(examples.captions)


def ours(directory: Path, workload: Workload, amount: Amount, profile: str, dtype: str) -> Prepared:
    """spqr_jax's own `finetune.train`."""
    start = time.perf_counter()
    import convert
    from spqr_jax import data as data_lib
    from spqr_jax import finetune
    from spqr_jax.devices import mesh

    mesh.split_cpu(workload.cpu_devices)
    imported = time.perf_counter()
    pipe = convert.load(directory, dtype=dtype)
    loaded = time.perf_counter()
    everything = data_lib.from_arrays(*data(workload, amount.samples))
    few = data_lib.from_arrays(*data(workload, workload.training_batch))
    batch = workload.training_batch

    def steps() -> Timed:
        """From the end of the first step to the end of the last: without encoding and setting up."""
        ends: list[float] = []
        begun = time.perf_counter()
        finetune.train(
            pipe,
            few,
            profile,
            steps=amount.steps + 1,
            batch_size=batch,
            on_step=lambda _: ends.append(time.perf_counter()),
        )
        return Timed(ends[-1] - ends[0], ends[0] - begun)

    def whole() -> float:
        losses: list[float] = []
        finetune.train(
            pipe,
            everything,
            profile,
            epochs=amount.epochs,
            batch_size=batch,
            on_step=lambda p: losses.append(p.loss),
        )
        return float(np.mean(losses))

    return Prepared({STEP: steps, WHOLE: whole}, {"import": imported - start, "loading": loaded - imported})


def theirs(
    directory: Path,
    workload: Workload,
    amount: Amount,
    profile: str,
    dtype: str,
    device: str,
    threads: int,
    layout: str,
) -> Prepared:
    """diffusers' scripts; every fine-tuning goes on from the weights of the one before, which costs the same."""
    start = time.perf_counter()
    import diffusers
    import torch

    from benchmarks import torch_training

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        directory, local_files_only=True, torch_dtype=torch.float32
    ).to(device)
    loaded = time.perf_counter()
    if layout == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    images, captions = data(workload, amount.samples)
    batch = workload.training_batch
    trainer = torch_training.Trainer(pipe, profile, dtype=dtype)

    def synchronise() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps() -> Timed:
        begun = synchronise()
        ids = torch_training.tokenize(pipe, captions[:batch]).to(device)
        latents, context = trainer.encode(torch_training.pixels(images[:batch], device), ids)
        trainer.step_on_latents(latents, context)
        first = synchronise()
        for _ in range(amount.steps):
            trainer.step_on_latents(latents, context)
        return Timed(synchronise() - first, first - begun)

    def whole() -> float:
        order = np.random.default_rng(0)
        rows = (part for _ in range(amount.epochs) for part in order.permutation(amount.samples).reshape(-1, batch))
        return float(np.mean(torch_training.train(trainer, images, captions, rows)))

    return Prepared({STEP: steps, WHOLE: whole}, {"import": imported - start, "loading": loaded - imported})


def compare(flags: argparse.Namespace, profile: str, directory: Path, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables of one profile."""
    workload, amount = models.WORKLOADS[flags.model], AMOUNTS[flags.model]
    workload = workload._replace(
        training_batch=flags.batch or workload.training_batch, training_side=flags.side or workload.training_side
    )
    amount = Amount(flags.steps or amount.steps, flags.samples or amount.samples, flags.epochs or amount.epochs)
    if amount.samples % workload.training_batch:
        raise ValueError(f"--samples {amount.samples} is not a multiple of the batch, {workload.training_batch}.")
    environment = side_by_side.our_environment(scratch / "jax", flags.device)
    common = (directory, workload, amount, profile, flags.dtype)
    contestants = {"ours": Side(ours, common, environment)}
    for side, layout in (("eager", "contiguous"), ("channels_last", "channels_last")):
        contestants[side] = Side(theirs, (*common, flags.device, flags.threads, layout))
    tasks = [STEP] if flags.steps_only else [STEP, WHOLE]
    found = side_by_side.race(
        contestants, tasks, rounds=flags.rounds, starts=1 if flags.rounds < 2 else 2, apart=flags.apart
    )
    rows = side_by_side.speed_rows(found, "ours", {STEP: amount.steps})
    firsts = [
        {"": f"seconds{label}"} | {side: starts[number].values[STEP] for side, starts in found.starts.items()}
        for number, label in enumerate(side_by_side.STARTS[: len(found.starts["ours"])])
    ]
    return {
        f"{profile}: median seconds; times ours [lowest, highest turn]": rows,
        f"{profile}: first step, compilation included; peak memory": [*firsts, {"": "GiB"} | found.peak],
    } | ({} if flags.steps_only else {f"{profile}: mean loss": [{side: v[WHOLE] for side, v in found.values.items()}]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.WORKLOADS, default="mini")
    parser.add_argument("--profiles", default=",".join(PROFILES))
    parser.add_argument("--batch", type=int, help="samples a step; default: tiny 4, mini 16, sd15 1")
    parser.add_argument("--side", type=int, help="picture side, a multiple of 32; default: tiny, mini 32, sd15 256")
    parser.add_argument("--steps", type=int, help="steps timed a turn; default: tiny 3, mini 10, sd15 2")
    parser.add_argument("--samples", type=int, help="of a whole fine-tuning; default: tiny 16, mini 128, sd15 4")
    parser.add_argument("--epochs", type=int, help="passes over the samples; default: tiny, sd15 2, mini 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps_only", action="store_true", help="no whole fine-tuning")
    parser.add_argument(
        "--apart", action="store_true", help="one process at a time, for memory; started anew each round"
    )
    parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch; default all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = models.directory(flags.model, Path(folder))
        for profile in flags.profiles.split(","):
            try:
                tables |= compare(flags, profile, directory, Path(folder))
            except RuntimeError as error:  # a side died: what the other profiles took is still worth printing
                tables[f"{profile}: not measured"] = [{"why": str(error).strip().splitlines()[-1]}]
    side_by_side.print_report(f"Fine-tuning, {flags.model}", tables)


if __name__ == "__main__":
    main()
