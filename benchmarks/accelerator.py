"""One accelerator in one command of under ten minutes, without a network: what runs on it, how fast, and how exactly.

    python -m benchmarks.accelerator [--append]
    python -m benchmarks.accelerator --size tiny      # whole on a CPU, in a minute: shows that the command works

1. Attention: written out, jax.nn.dot_product_attention (by cuDNN's flash kernel on a GPU), and ours; with gradients.
2. The emoji world's images: sampled on the device and on the CPU, and by how many levels of 256 they differ.
3. Stable Diffusion 1.5 with random weights: sampling in batches, and a step of each fine-tuning profile, with the share
   of the card's peak; beside diffusers, eager and under torch.compile, where PyTorch has the device too.
4. Judges with the CUDA provider, where onnxruntime-gpu is installed, against the CPU.

Every measurement has a process of its own. So one that fails takes no other with it, and none holds memory of the next.
What `--minutes` does not allow any more is left out, and said to be.
"""

import argparse
import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import finetuning_speed, generation_speed, models, side_by_side
from benchmarks.finetuning_speed import PROFILES, STEP, Amount
from benchmarks.side_by_side import Prepared, Side

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
REPEATS = 5
# Dense bfloat16 products, TFLOP/s, from the makers' data sheets; the longest beginning of a device's name counts.
PEAKS = {
    "NVIDIA A10": 125,
    "NVIDIA A100": 312,
    "NVIDIA B200": 2250,
    "NVIDIA H100": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
}
# FLOP of an image of 512 x 512 in 50 PNDM steps, and of a step with 16 samples: docs/scale.md.
IMAGE_FLOP, STEP_FLOP = 84.5e12, {"lite": 27.0e12, "moderate": 27.4e12, "standard": 38.8e12}


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        model: of `models.WORKLOADS`.
        dtype: of its weights, and of attention.
        attention: (queries, keys, heads, head size); attention_rows: B.
        batches, steps: images at once, and steps, of sampling.
        profiles: of fine-tuning; training_side, training_batch: pixels and samples of a training step.
        emoji, judged: images of the emoji world, and for the judges.
        rounds: times that all but attention is timed, after a first time.
    """

    model: str
    dtype: str
    attention: tuple[tuple[int, int, int, int], ...]
    attention_rows: int
    batches: tuple[int, ...]
    steps: int
    profiles: tuple[str, ...]
    training_side: int
    training_batch: int
    emoji: int
    judged: int
    rounds: int


SD15_ATTENTION = ((4096, 4096, 8, 40), (4096, 77, 8, 40), (1024, 1024, 8, 80), (1024, 77, 8, 80))
SIZES = {
    "tiny": Size("tiny", "float32", ((64, 64, 2, 8), (64, 7, 2, 8)), 2, (1,), 2, ("lite",), 32, 4, 4, 4, 1),
    "sd15": Size("sd15", "bfloat16", SD15_ATTENTION, 16, (16, 8, 32), 50, PROFILES[::-1], 512, 16, 64, 64, 3),
}


class Bench(NamedTuple):
    """What all measurements share: device is the name of ours, peak its FLOP/s (0: unknown), rivals PyTorch's device
    ("": none)."""

    size: Size
    scratch: Path
    directory: Path
    device: str
    peak: float
    rivals: str


# --- in processes of their own


def device() -> Prepared:
    """Task "found": (platform, name) of the device that JAX takes."""
    import jax

    return Prepared({"found": lambda: (jax.default_backend(), jax.devices()[0].device_kind)}, {})


def attentions(size: Size) -> Prepared:
    """Task "rows": milliseconds of every formulation for every shape, and how far each is from float32."""
    return Prepared({"rows": lambda: [_attention_row(size, *shape) for shape in size.attention]}, {})


def _attention_row(size: Size, queries: int, keys: int, heads: int, depth: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from spqr_jax.backbones.models.attention import attention
    from spqr_jax.devices import target

    ours = functools.partial(attention, target=target.here())
    lengths = (queries, keys, keys)
    exact = [
        jax.random.normal(jax.random.key(i), (size.attention_rows, length, heads, depth))
        for i, length in enumerate(lengths)
    ]
    given = [x.astype(size.dtype) for x in exact]
    reference = jax.jit(_written_out)(*(x.astype(jnp.float32) for x in given))
    row: dict[str, Any] = {"queries x keys, heads x size": f"{queries} x {keys}, {heads} x {depth}"}
    for name, formulation in (("plain", _written_out), ("jax.nn", _of_jax), ("ours", ours)):
        forward = jax.jit(formulation)
        gradient = jax.jit(jax.grad(lambda q, k, v, f=formulation: f(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)))
        row[f"{name}, ms"] = _attempted(lambda f=forward: 1000 * _seconds(f, given))
        row[f"{name} with gradients, ms"] = _attempted(lambda f=gradient: 1000 * _seconds(f, given))
        row[f"{name}, error"] = _attempted(lambda f=forward: float(jnp.abs(f(*given) - reference).max()))
    return row


def _written_out(q: Any, k: Any, v: Any) -> Any:
    """Attention as its formula says, softmax in float32: [B, L, N, D], [B, M, N, D] -> [B, L, N, D]."""
    import jax
    import jax.numpy as jnp

    scores = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def _of_jax(q: Any, k: Any, v: Any) -> Any:
    import jax

    flash = jax.default_backend() == "gpu" and q.dtype != np.float32
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if flash else None)


def _seconds(function: Callable[..., Any], given: list[Any]) -> float:
    """Median time of a call, after a first one that compiles."""
    import jax

    jax.block_until_ready(function(*given))
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*given))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def _attempted(work: Callable[[], float]) -> float | str:
    """The result, or the error in a few words: a formulation that a platform refuses is a finding."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {_short(error)}"


def emoji(count: int) -> Prepared:
    """Task "images": so many images of the emoji world, uint8 [N, H, W, 3]."""
    import convert
    from spqr_jax import generate, mini

    pipe, workload = convert.load(mini.model_path()), models.WORKLOADS["mini"]
    options = {"steps": workload.steps, "guidance": workload.guidance, "scheduler": workload.scheduler}
    texts = models.prompts(count)
    return Prepared({"images": lambda: generate.generate(pipe, texts, 0, batch_size=count, **options)}, {})


def judging(provider: str, count: int, small: bool) -> Prepared:
    """Tasks named after judges: what each says about so many photographs. small: only a judge that is no work."""
    from benchmarks.judges_speed import photographs
    from judges.inception import Inception
    from spqr_jax import mini

    if small:
        judges = {"emoji features": Inception.open(mini.judge_path("features"), providers=provider)}
        images = mini.reference_images(count)
    else:
        judges, images = _large_judges(provider), photographs(count)
    return Prepared({name: lambda judge=judge: judge(images) for name, judge in judges.items()}, {})


def _large_judges(provider: str) -> dict[str, Any]:
    import torch

    from convert.graphs.inception import Inception2015, export_inception
    from judges.inception import Inception
    from judges.nudenet import NudeNet

    network = Inception2015().eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "weights.pth")
        graph = export_inception(Path(folder) / "weights.pth", folder).path
        inception = Inception.open(graph, providers=provider)
    nudenet = NudeNet.open(providers=provider)
    return {"inception": inception, "nudenet": lambda images: [record.score for record in nudenet(images)]}


# --- the measurements, each of which gives the rows of a table

Measurement = tuple[str, Callable[[Bench], list[dict[str, Any]]]]


def measurements(size: Size) -> Iterator[Measurement]:
    """(table, function) in the order of what is most wanted."""
    yield "Attention", lambda bench: ask(Side(attentions, (size,)), "rows")
    yield "Emoji world on the device against the CPU", emoji_rows
    for number, batch in enumerate(size.batches):
        yield "Sampling", lambda bench, batch=batch: sampling_rows(bench, batch)
        if number == 0:
            for profile in size.profiles:
                yield "Fine-tuning", lambda bench, profile=profile: training_rows(bench, profile)
    yield "Judges", judges_rows


def ask(side: Side, task: str) -> Any:
    """What one task of a side returns, in a process of its own. Raises RuntimeError with its traceback."""
    return side_by_side.race({"": side}, [task], rounds=0, starts=1).values[""][task]


def ours(bench: Bench, prepare: Callable[..., Prepared], *args: Any) -> Side:
    return Side(prepare, args, {"JAX_COMPILATION_CACHE_DIR": str(bench.scratch / "jax")})


def emoji_rows(bench: Bench) -> list[dict[str, Any]]:
    """How far the device's images are from the CPU's, in levels of 256."""
    count = bench.size.emoji
    there = ask(Side(emoji, (count,)), "images").astype(int)
    here = ask(Side(emoji, (count,), {"JAX_PLATFORMS": "cpu"}), "images").astype(int)
    far = np.abs(there - here)
    return [
        {
            "images": count,
            "identical": int((far.max((1, 2, 3)) == 0).sum()),
            "largest difference, levels": int(far.max()),
            "mean difference, levels": float(far.mean()),
            "channels more than 1 level apart": f"{100 * (far > 1).mean():.3f}%",
        }
    ]


def sampling_rows(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Images a second of every side, a whole sample timed."""
    size = bench.size
    workload = models.WORKLOADS[size.model]._replace(batch=batch, steps=size.steps, cpu_devices=1)
    common, threads = (bench.directory, workload, size.dtype), side_by_side.cores()
    found = {"ours": ours(bench, generation_speed.ours, *common)}
    if bench.rivals:
        rival = (*common, bench.rivals, threads, "channels_last")
        found["diffusers eager"] = Side(generation_speed.theirs, (*rival, False))
        if bench.rivals == "cuda":
            found["diffusers compiled"] = Side(generation_speed.theirs, (*rival, True))
    flop = batch * IMAGE_FLOP if size.model == "sd15" else 0
    return [
        {"images at once": batch, "side": name} | speed(bench, side, "sample", batch, "images/s", flop)
        for name, side in found.items()
    ]


def training_rows(bench: Bench, profile: str) -> list[dict[str, Any]]:
    """Steps a second of every side, on latents and text states that are there."""
    size, amount = bench.size, Amount(steps=10, samples=bench.size.training_batch, epochs=1)
    workload = models.WORKLOADS[size.model]._replace(
        training_batch=size.training_batch, training_side=size.training_side, cpu_devices=1
    )
    common = (bench.directory, workload, amount, profile, size.dtype)
    found = {"ours": ours(bench, finetuning_speed.ours, *common)}
    if bench.rivals:
        rival = (*common, bench.rivals, side_by_side.cores(), "channels_last")
        found["diffusers eager"] = Side(finetuning_speed.theirs, rival)
    flop = amount.steps * STEP_FLOP[profile] if size.model == "sd15" else 0
    return [
        {"profile": profile, "side": name} | speed(bench, side, STEP, amount.steps, "steps/s", flop)
        for name, side in found.items()
    ]


def speed(bench: Bench, side: Side, task: str, count: int, unit: str, flop: float) -> dict[str, Any]:
    """A side's rate at a task that makes `count` of something, its first call with compilation, its share of the peak.

    A side that fails, for want of memory for example, has the reason instead.
    """
    try:
        found = side_by_side.race({"": side}, [task], rounds=bench.size.rounds, starts=1)
    except RuntimeError as error:
        return {unit: f"failed: {_short(error)}"}
    seconds, first = float(np.median(found.seconds[""][task])), found.starts[""][0].first[task]
    if isinstance(found.values[""][task], float):
        first = found.values[""][task]  # a training task says itself when its first step ended
    share = f"{100 * flop / seconds / bench.peak:.1f}%" if flop and bench.peak else "unknown"
    return {unit: count / seconds, "first call, s": first, "share of the peak": share}


def judges_rows(bench: Bench) -> list[dict[str, Any]]:
    """Images a second of the CPU provider and, where ONNX Runtime has it, of CUDA; how far the answers are apart."""
    import onnxruntime

    small, count = bench.size.model == "tiny", bench.size.judged
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    names = ["emoji features"] if small else ["inception", "nudenet"]
    sides = {name: Side(judging, (name, count, small)) for name in ("cpu", *(("cuda",) if has_cuda else ()))}
    found = side_by_side.race(sides, names, rounds=bench.size.rounds, starts=1)
    rows = []
    for judge in names:
        row: dict[str, Any] = {"judge": judge}
        row |= {f"{name}, images/s": count / float(np.median(found.seconds[name][judge])) for name in sides}
        if has_cuda:
            answers = [np.asarray(found.values[name][judge], float) for name in ("cpu", "cuda")]
            row["largest difference"] = float(np.abs(answers[0] - answers[1]).max())
        rows.append(row)
    return rows


# --- the command


def measure(bench: Bench, deadline: float) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows. A measurement that fails is a row that says so, and so is one after the deadline (monotonic)."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, measurement in measurements(bench.size):
        if time.monotonic() > deadline:
            rows = [{"not measured": "the time was over; --minutes gives more"}]
        else:
            try:
                rows = measurement(bench)
            except (RuntimeError, ImportError, OSError) as error:
                rows = [{"not measured": _short(error)}]
        side_by_side.progress(f"{table}: {rows}")
        tables.setdefault(table, []).extend(rows)
    return tables


def _short(error: Exception) -> str:
    """The last line of an error's text, fit for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:100].replace("|", "/")


def peak_of(name: str) -> float:
    """TFLOP/s of a device by its name; 0 for one that is not in PEAKS."""
    return PEAKS.get(max((known for known in PEAKS if name.startswith(known)), key=len, default=""), 0)


def rivals_on(platform: str) -> str:
    """The device of PyTorch that compares with JAX's: "cuda" where both have a GPU, else "" for none.

    On a CPU `benchmarks.generation_speed` and `.finetuning_speed` compare the two.
    """
    try:
        import torch
    except ImportError:
        return ""
    return "cuda" if platform == "gpu" and torch.cuda.is_available() else ""


def section(bench: Bench, tables: dict[str, list[dict[str, Any]]], minutes: float) -> str:
    """The section of docs/performance.md that holds these figures."""
    command = f"python -m benchmarks.accelerator --size {next(key for key in SIZES if SIZES[key] == bench.size)}"
    shown = "\n".join(f"{title}:\n\n{side_by_side.markdown(rows)}" for title, rows in tables.items())
    peak = f"peak {bench.peak / 1e12:.0f} TFLOP/s in bfloat16" if bench.peak else "peak unknown"
    return (
        f"### {bench.device}, {datetime.date.today()} (`{command}`)\n\n"
        f"{bench.size.model} in {bench.size.dtype}; {peak}; {minutes:.1f} minutes. {side_by_side.machine()}\n\n{shown}"
    )


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--minutes", type=float, default=9, help="no measurement begins after nine tenths of this time")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in bfloat16, if its name is not known here")
    parser.add_argument("--append", nargs="?", type=Path, const=PAGE, help="add the section to docs/performance.md")
    flags = parser.parse_args()
    platform, name = ask(Side(device), "found")
    with tempfile.TemporaryDirectory() as folder:
        size, scratch = SIZES[flags.size], Path(folder)
        directory = models.directory(size.model, scratch)
        peak = 1e12 * (flags.peak or peak_of(name))
        bench = Bench(size, scratch, directory, name, peak, rivals_on(platform))
        tables = measure(bench, start + 0.9 * 60 * flags.minutes)
    text = section(bench, tables, (time.monotonic() - start) / 60)
    print(text, end="")
    if flags.append:
        with flags.append.open("a", encoding="utf-8") as page:
            page.write(f"\n{text}")


if __name__ == "__main__":
    main()
