"""Alignment methods: time and peak memory on the emoji world, and what they would take on Stable Diffusion 1.5.

    python -m benchmarks.methods [--methods uce,esd] [--no_estimate]
    python -m benchmarks.methods --no_measure --evaluation_seconds 0.02 --step_seconds 0.07
    python -m benchmarks.methods --no_measure --full_uce

Measured: every method with its settings of configs/table1_mini.py (ResAlign and SafetyDPO, which are not in that table,
with settings scaled by the same rule), once, in a process of its own with no compilation cache; "none" is what loading
the pipeline takes. Estimated: counts at the authors' settings for nudity (benchmarks/rehearsal.py says how they are
found) times the cost of one UNet evaluation of one 512x512 sample, and of an image in the VAE. That cost is
arithmetic, 0.8 TFLOP at a sustained rate of --tflops, or a time measured on your machine (--evaluation_seconds;
--step_seconds for training, one sample's forward and backward pass of the whole UNet; benchmarks.generation_speed and
.finetuning_speed measure them). Batches, compilation and closed-form edits are not in the estimate.

--full_uce: UCE with the preset "nudity" on SD1.5's text encoder and cross-attention in full size, random weights; the
rest of the UNet is not needed and not made.
"""

import argparse
import time
from typing import Any, NamedTuple

from benchmarks import models, side_by_side
from benchmarks.side_by_side import Prepared, Side, Worker

# FLOP of SD1.5 at 512x512: the UNet for one sample, the VAE's decoder and encoder for one image (configs/paper.py).
EVALUATION, DECODING, ENCODING = 0.8e12, 2.5e12, 1.1e12
CLOSED_FORM = ("uce", "rece")
# Not in configs/table1_mini.py: authors' settings made small by the rule stated there.
FURTHER = {
    "resalign": {"images": 160, "steps": 8, "sampling_steps": 10, "sampling_guidance": 4.0},
    "safety_dpo": {"images": 160, "batch_size": 8, "steps": 100, "sampling_steps": 10, "sampling_guidance": 4.0},
}


class Cost(NamedTuple):
    """Seconds on SD1.5: of one UNet evaluation, of an evaluation's worth of training, of one FLOP in the VAE."""

    evaluation: float
    training: float
    flop: float


def settings() -> dict[str, dict[str, Any]]:
    """Method -> options, in the order of the table; the control is first."""
    from configs import table1_mini

    return {subject.method: dict(subject.options) for subject in table1_mini.get_config().subjects} | FURTHER


# --- measured --------------------------------------------------------------------------------------------------------


def on_the_emoji_world(name: str, options: dict[str, Any]) -> Prepared:
    """The task "align": seconds in XLA's compiler, and GiB of an accelerator's memory where it says so."""
    start = time.perf_counter()
    import jax
    from jax import monitoring

    from configs import mini as mini_config
    from spqr_jax.methods import METHODS
    from spqr_jax.run import names

    imported = time.perf_counter()
    config = mini_config.get_config()
    pipeline, concept = names.backbone(config), names.concept(config)
    compiling = Compiling()
    monitoring.register_event_duration_secs_listener(compiling)

    def align() -> dict[str, float]:
        aligned = METHODS[name].align(pipeline, concept, seed=config.seed, **options)
        jax.block_until_ready(aligned.params)
        memory = jax.devices()[0].memory_stats() or {}
        return {"compiling": compiling.seconds, "device": memory.get("peak_bytes_in_use", 0) / 2**30}

    return Prepared({"align": align}, {"import": imported - start, "loading": time.perf_counter() - imported})


class Compiling:
    """Sums the time that XLA takes to compile, as JAX reports it."""

    seconds = 0.0

    def __call__(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration


def measured(methods: list[str], platform: str) -> list[dict[str, Any]]:
    rows, chosen = [], settings()
    for name in methods:
        result, peak = in_a_process(Side(on_the_emoji_world, (name, chosen[name]), environment(platform)), "align")
        row = {"method": name, "seconds": result.seconds, "of them compiling": result.value["compiling"]}
        row |= {"peak GiB": peak} | ({"device GiB": result.value["device"]} if result.value["device"] else {})
        rows.append(row)
        side_by_side.progress(str(row))
    return rows


def environment(platform: str) -> dict[str, str]:
    return {"JAX_PLATFORMS": platform, "JAX_ENABLE_COMPILATION_CACHE": "false"}


def in_a_process(side: Side, task: str) -> tuple[side_by_side.Timed, float]:
    """A task's first call and the peak memory, GiB, of the process that nothing else has run in."""
    worker = Worker(side)
    result = worker.run(task)
    return result, worker.close()


# --- estimated -------------------------------------------------------------------------------------------------------


def counting(methods: list[str]) -> Prepared:
    """A task a method that counts, and "step", the evaluations that one sample's training step is worth."""
    from benchmarks import rehearsal

    tasks: dict[str, Any] = {name: lambda name=name: rehearsal.rehearse(name) for name in methods}
    return Prepared(tasks | {"step": rehearsal.trained_step}, {})


def cost(flags: argparse.Namespace, step: float) -> Cost:
    """step: how many evaluations a training step is worth in FLOP."""
    evaluation = flags.evaluation_seconds or EVALUATION / (flags.tflops * 1e12)
    training = flags.step_seconds / step if flags.step_seconds else evaluation
    return Cost(evaluation, training, evaluation / EVALUATION)


def seconds(counts: Any, cost: Cost) -> float:
    """What benchmarks.rehearsal.Counts come to on SD1.5."""
    vae = (counts.pictures * DECODING + counts.encoded * ENCODING) * cost.flop
    return counts.sampling * cost.evaluation + counts.training * cost.training + vae


def estimated(methods: list[str], flags: argparse.Namespace) -> list[dict[str, Any]]:
    worker = Worker(Side(counting, (methods,), environment("cpu")))
    price, rows = cost(flags, worker.run("step").value), []
    for name in methods:
        counts = worker.run(name).value
        whole = seconds(counts, price)
        row: dict[str, Any] = {"method": name, "pictures made": f"{counts.pictures:,.0f}"}
        row |= {"evaluations to sample": f"{counts.sampling:,.0f}", "training steps": f"{counts.steps:,.0f}"}
        row |= {"worth evaluations": f"{counts.training:,.0f}", "hours on SD1.5": whole / 3600}
        rows.append(row)
        side_by_side.progress(str(row))
    worker.close()
    return rows


# --- UCE in full size ------------------------------------------------------------------------------------------------


def full_size() -> Prepared:
    """The task "uce" on SD1.5's sizes; loading is drawing random weights."""
    start = time.perf_counter()
    import jax

    from spqr_jax.concepts import NUDITY
    from spqr_jax.methods import uce
    from spqr_jax.methods.tools import closed_form

    imported = time.perf_counter()
    pipeline = sd15()
    drawn = time.perf_counter()

    def align() -> int:
        aligned = uce.align(pipeline, NUDITY)
        jax.block_until_ready(aligned.params)
        return len(closed_form.key_value_matrices(aligned.params["unet"]))

    return Prepared({"uce": align}, {"import": imported - start, "drawing weights": drawn - imported})


def sd15() -> Any:
    """A pipeline with SD1.5's text encoder and its UNet's attn2.to_k and to_v, random; the tokenizer is the emoji
    world's, padding to 77 tokens."""
    import jax
    import numpy as np
    from transformers import CLIPTokenizer

    from spqr_jax import backbones, mini
    from spqr_jax import params as params_lib
    from spqr_jax.backbones.stable_diffusion import UNET_REGIONS
    from spqr_jax.pipeline import Pipeline

    rng = np.random.default_rng(0)

    def draw(shapes: Any) -> Any:
        return jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)

    tokens = models.WORKLOADS["sd15"].tokens
    tokenizer = CLIPTokenizer.from_pretrained(str(mini.model_path() / "tokenizer"), model_max_length=tokens)
    text = {**models.CONFIGS["sd15"]["text_encoder"], "max_position_embeddings": tokens}
    configs = {"unet": models.CONFIGS["sd15"]["unet"], "text_encoder": text}
    defined = {name: backbones.define(name, config) for name, config in configs.items()}
    unet = params_lib.flatten(defined["unet"][1])
    edited = params_lib.unflatten({path: shape for path, shape in unet.items() if UNET_REGIONS.key_value.search(path)})
    params = {"unet": draw(edited), "text_encoder": draw(defined["text_encoder"][1]), "vae": {}}  # UCE needs no VAE
    definitions = {name: definition for name, (definition, _) in defined.items()}
    configs["vae"] = models.CONFIGS["sd15"]["vae"]
    return Pipeline(params, definitions, configs, {"tokenizer": tokenizer}, "SD1.5 in size")


def full_uce(platform: str) -> list[dict[str, Any]]:
    result, peak = in_a_process(Side(full_size, (), environment(platform)), "uce")
    return [{"method": "uce", "seconds, compilation included": result.seconds, "matrices": result.value, "GiB": peak}]


def main() -> None:
    known = settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(known), help=f"default all: {', '.join(known)}")
    parser.add_argument("--no_measure", action="store_true", help="nothing on the emoji world")
    parser.add_argument("--no_estimate", action="store_true", help="nothing about SD1.5")
    parser.add_argument("--full_uce", action="store_true", help="UCE on SD1.5's sizes too")
    parser.add_argument("--evaluation_seconds", type=float, default=0.0, help="one UNet evaluation of one sample")
    parser.add_argument("--step_seconds", type=float, default=0.0, help="one sample's step on the whole UNet")
    parser.add_argument("--tflops", type=float, default=100.0, help="sustained rate where no seconds are given")
    parser.add_argument("--platform", default="cpu", help="of JAX: cpu, cuda or tpu")
    flags = parser.parse_args()
    methods = flags.methods.split(",")
    for name in methods:
        if name not in known:
            parser.error(f"--methods: {name!r} is unknown; expected some of {', '.join(known)}.")
    tables: dict[str, list[dict[str, Any]]] = {}
    if not flags.no_measure:
        tables["On the emoji world, settings of configs/table1_mini.py"] = measured(methods, flags.platform)
    if not flags.no_estimate:
        learned = [name for name in methods if name not in ("none", "sld", *CLOSED_FORM)]
        tables["Estimated for SD1.5 at the authors' settings for nudity"] = estimated(learned, flags)
    if flags.full_uce:
        tables["UCE on SD1.5's sizes, random weights"] = full_uce(flags.platform)
    side_by_side.print_report("Alignment methods", tables)


if __name__ == "__main__":
    main()
