"""Generation against diffusers on PyTorch, same weights, same machine, in turn.

    python -m benchmarks.generation_speed --model mini
    python -m benchmarks.generation_speed --model sd15 --apart [--full] [--compile]

One UNet step with guidance, a whole sample and a VAE decode; then what comes before the first image (imports,
loading, compilation without and with a filled cache), and peak memory. Sides: ours; diffusers eager; its UNet and VAE
in channels-last layout; with --compile also under torch.compile, which needs a C++ compiler. sd15 has random weights
in the full SD1.5 config; without --full its sample is estimated as its UNet evaluations and one decode.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, side_by_side
from benchmarks.models import Workload
from benchmarks.side_by_side import Measured, Prepared, Side

TASKS = ["UNet step", "VAE decode", "sample"]


def inputs(workload: Workload, shape: tuple[int, int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, h, w, C] and text states [2B, L, E], negative half first."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((workload.batch, *shape)).astype(np.float32)
    return latents, rng.standard_normal((2 * workload.batch, workload.tokens, width)).astype(np.float32)


def ours(directory: Path, workload: Workload, dtype: str) -> Prepared:
    """spqr_jax; every task returns float32, images in [-1, 1]."""
    start = time.perf_counter()
    import jax

    import convert
    from spqr_jax import backbones, generate
    from spqr_jax.backbones import Condition
    from spqr_jax.devices import mesh as mesh_lib
    from spqr_jax.sampling.guidance import Guided, guided_prediction

    mesh_lib.split_cpu(workload.cpu_devices)
    imported = time.perf_counter()
    pipe = convert.load(directory, dtype=dtype)
    loaded = time.perf_counter()
    unet, side = pipe.configs["unet"], pipe.configs["unet"]["sample_size"]
    latents, states = inputs(workload, (side, side, unet["in_channels"]), unet["cross_attention_dim"])
    negative, context = np.split(states, 2)
    scale = np.full(workload.batch, workload.guidance, np.float32)
    condition = Guided(Condition(context), Condition(negative), scale)
    backbone, denoiser = backbones.of(pipe), backbones.denoiser(pipe)
    texts, scaling = models.prompts(workload.batch), backbone.scaling(pipe)

    @jax.jit
    def step(params, condition, latents):
        return guided_prediction(denoiser.bind(params), condition, True, latents, np.int32(500))

    @jax.jit
    def decode(params, latents):
        return backbone.decode(pipe.definitions["vae"].bind(params), latents, scaling)

    def sample():
        options = {"steps": workload.steps, "guidance": workload.guidance, "scheduler": workload.scheduler}
        images = generate.generate(pipe, texts, 0, latents=noise, batch_size=workload.batch, **options)
        return images / np.float32(127.5) - 1

    mesh = mesh_lib.make()
    on_device = {name: mesh_lib.replicate(pipe.params[name], mesh) for name in ("unet", "vae")}
    noise, condition = latents, mesh_lib.split_batch(condition, mesh)
    latents = mesh_lib.split_batch(latents, mesh)
    tasks = {
        "UNet step": lambda: np.asarray(step(on_device["unet"], condition, latents)),
        "VAE decode": lambda: np.asarray(decode(on_device["vae"], latents)),
        "sample": sample,
    }
    return Prepared(tasks, {"import": imported - start, "loading": loaded - imported})


def theirs(
    directory: Path, workload: Workload, dtype: str, device: str, threads: int, layout: str, compiled: bool
) -> Prepared:
    """diffusers' StableDiffusionPipeline; tasks and results as `ours`."""
    start = time.perf_counter()
    import diffusers
    import torch

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    own = getattr(torch, dtype)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(directory, local_files_only=True, torch_dtype=own)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    loaded = time.perf_counter()
    side = pipe.unet.config.sample_size
    shape = side, side, pipe.unet.config.in_channels
    latents, states = inputs(workload, shape, pipe.unet.config.cross_attention_dim)
    latents = torch.tensor(latents.transpose(0, 3, 1, 2), dtype=own, device=device)
    states = torch.tensor(states, dtype=own, device=device)
    texts, scaling = models.prompts(workload.batch), pipe.vae.config.scaling_factor
    if layout == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)

    def step():
        t = torch.tensor(500, device=device)
        negative, positive = pipe.unet(torch.cat([latents] * 2), t, states, return_dict=False)[0].chunk(2)
        return _nhwc(negative + workload.guidance * (positive - negative))

    def sample():
        options = {"num_inference_steps": workload.steps, "guidance_scale": workload.guidance, "output_type": "np"}
        return 2 * pipe(texts, latents=latents, **options).images - 1

    tasks = {
        "UNet step": step,
        "VAE decode": lambda: _nhwc(pipe.vae.decode(latents / scaling, return_dict=False)[0]),
        "sample": sample,
    }
    no_grad = {name: torch.no_grad()(task) for name, task in tasks.items()}
    return Prepared(no_grad, {"import": imported - start, "loading": loaded - imported})


def _nhwc(x: Any) -> np.ndarray:
    return x.permute(0, 2, 3, 1).float().cpu().numpy()


def sides(flags: argparse.Namespace, directory: Path, workload: Workload, scratch: Path) -> dict[str, Side]:
    common = (directory, workload, flags.dtype)
    found = {
        "ours": Side(ours, common, side_by_side.our_environment(scratch / "jax", flags.device)),
        "eager": Side(theirs, (*common, flags.device, flags.threads, "contiguous", False)),
        "channels_last": Side(theirs, (*common, flags.device, flags.threads, "channels_last", False)),
    }
    if flags.compile:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        found["compile"] = Side(theirs, (*common, flags.device, flags.threads, "channels_last", True), environment)
    return found


def agreement(found: Measured) -> list[dict[str, Any]]:
    """The largest difference of each side's results from eager's, over eager's largest value: the same work was done.
    Ours of a sample is seen after rounding to 256 levels."""
    rows = []
    for task, reference in found.values["eager"].items():
        row: dict[str, Any] = {"difference from eager": task}
        for side, values in found.values.items():
            if side != "eager":
                row[side] = float(np.abs(values[task] - reference).max() / np.abs(reference).max())
        rows.append(row)
    return rows


def estimated_sample(found: Measured, workload: Workload) -> list[dict[str, Any]]:
    """A sample from its parts, for models whose whole sample takes minutes."""
    count = models.evaluations(workload)
    estimates = {
        side: [count * step + decode for step, decode in zip(tasks["UNet step"], tasks["VAE decode"], strict=True)]
        for side, tasks in found.seconds.items()
    }
    row: dict[str, Any] = {"task": f"sample, estimated ({count} UNet steps, 1 VAE decode)"}
    row |= {side: statistics.median(seconds) for side, seconds in estimates.items()}
    row |= {
        f"{side} / ours": side_by_side.ratio(seconds, estimates["ours"])
        for side, seconds in estimates.items()
        if side != "ours"
    }
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.WORKLOADS, default="mini")
    parser.add_argument("--batch", type=int, help="pictures at once; default: tiny 2, mini 16, sd15 1")
    parser.add_argument("--steps", type=int, help="sampling steps; default: tiny 4, mini 12, sd15 20")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", default="", help=f"some of {', '.join(TASKS)}; default all that the model affords")
    parser.add_argument(
        "--apart", action="store_true", help="one process at a time, for memory; started anew each round"
    )
    parser.add_argument("--full", action="store_true", help="sd15: also time a whole sample")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--cpu_devices", type=int, help="that ours splits a CPU into; default: mini 2, others 1")
    parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch; default all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.parse_args()
    workload = models.WORKLOADS[flags.model]
    given = {"batch": flags.batch, "steps": flags.steps, "cpu_devices": flags.cpu_devices}
    workload = workload._replace(**{name: value for name, value in given.items() if value})
    default = TASKS if flags.model != "sd15" or flags.full or flags.device != "cpu" else TASKS[:2]
    tasks = [task.strip() for task in flags.tasks.split(",")] if flags.tasks else default
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        contestants = sides(flags, models.directory(flags.model, scratch), workload, scratch)
        found = side_by_side.race(contestants, tasks, rounds=flags.rounds, apart=flags.apart)
    rows = side_by_side.speed_rows(found, "ours")
    if "sample" not in tasks and set(TASKS[:2]) <= set(tasks):
        rows += estimated_sample(found, workload)
    tables = {
        f"Median seconds for {workload.batch} pictures; times ours [lowest, highest turn]": rows,
        "Before the first picture": side_by_side.start_rows(found),
        "Peak memory": [{"": "GiB"} | found.peak],
        "Same work": agreement(found),
    }
    side_by_side.print_report(f"Generation, {flags.model}", tables)


if __name__ == "__main__":
    main()
