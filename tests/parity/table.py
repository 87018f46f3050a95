"""The parity table: every block type, whole models and whole samples against PyTorch, with the error of each.

    python -m tests.parity.table [--full] [--out docs/parity.md]

Prints the table and writes it into the page, below its marker. The comparisons are the tests' own. `--full` adds Stable
Diffusion 1.5's whole UNet (8 GiB of memory). Exit status 1 if a row is over its limit.
"""

import argparse
import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import conftest  # before JAX: it names the backend and the compilation cache

# isort: split
import diffusers
import jax
import torch

import convert
from spqr_jax import mini
from tests import flow_reference, flux_reference
from tests.parity import blocks, compared, samples
from tests.parity.compared import Compared

KINDS = {"sd1": "tiny SD1", "sd2": "tiny SD2", "sdxl": "tiny SDXL"}
FLOWS = {"sd3": "tiny SD3", "sd35m": "tiny SD3.5 medium", "sd35": "tiny SD3.5 large"}
PROMPTS = ["a cat", "nude", ""]
PARTS = ("UNet", "transformer", "VAE", "text encoder", "whole model", "whole sample")
MARKER = "<!-- Written by python -m tests.parity.table; edit above. -->\n"
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def comparisons(full: bool) -> Iterator[tuple[str, list[Compared]]]:
    """(part, rows), a model at a time."""
    yield "", compared.formulations()
    for kind, name in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = conftest.torch_pipeline(kind)
            pipe.save_pretrained(folder)
            pair = pipe, convert.load(folder)
            yield from parts(*pair, name, PROMPTS)
            if kind == "sd1":
                yield "whole model", compared.unet(*pair, name, side=(9, 7))
            for scheduler in samples.SCHEDULERS:
                yield "whole sample", samples.sample(pipe, Path(folder), name, scheduler)
    for kind, name in FLOWS.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = flow_reference.sd3(kind)
            pipe.save_pretrained(folder)
            yield from flow_parts(pipe, convert.load(folder), name)
    for kind in flux_reference.KINDS:
        yield from flux_parts(kind)
    path = mini.model_path()  # trained weights, read by both from the same directory
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path, local_files_only=True, torch_dtype=torch.float32)
    yield from parts(pipe, convert.load(path), "emoji world", [p.prompt for p in mini.prompts("benign", 4, 0)])
    if full:
        yield "whole model", compared.sd15_unet()


def parts(pipe, pipeline, name: str, prompts: list[str]) -> Iterator[tuple[str, list[Compared]]]:
    """Blocks and whole models of one pipeline."""
    yield "UNet", blocks.of_unet(pipe, pipeline, name)
    if name not in ("tiny SD2", "tiny SDXL"):  # whose VAE is SD1's
        yield "VAE", blocks.of_vae(pipe, pipeline, name)
    yield "text encoder", blocks.of_text_encoders(pipe, pipeline, name, prompts)
    yield "whole model", compared.unet(pipe, pipeline, name) + compared.vae(pipe, pipeline, name)
    yield "whole model", compared.text_encoders(pipe, pipeline, name, prompts)


def flow_parts(pipe, pipeline, name: str) -> Iterator[tuple[str, list[Compared]]]:
    """Blocks, whole models and whole samples of one pipeline of SD3. VAE and T5 are the same in all of them."""
    yield "transformer", blocks.of_sd3(pipe.transformer, pipeline, name)
    yield "whole model", compared.sd3(pipe.transformer, pipeline, name)
    if name == "tiny SD3":
        yield "VAE", blocks.of_vae(pipe, pipeline, name)
        yield "text encoder", blocks.of_t5(pipe.text_encoder_3, pipeline, "text_encoder_3", name)
        yield "whole model", compared.vae(pipe, pipeline, name)
        yield "whole model", compared.t5(pipe.text_encoder_3, pipeline, "text_encoder_3", name)
    for steps in (8, 28):
        yield "whole sample", samples.flow_sample(pipe, pipeline, name, steps)


def flux_parts(kind: str) -> Iterator[tuple[str, list[Compared]]]:
    """Blocks, the whole transformer and whole samples of FLUX. Its VAE and T5 are those of SD3."""
    yield "transformer", flux_reference.of_blocks(kind)
    yield "whole model", [flux_reference.whole(kind)]
    pipeline = convert.load(flux_reference.saved(kind)[1])
    for steps in (8, 28):
        yield "whole sample", flux_reference.sample(kind, pipeline, steps)


def markdown(found: list[tuple[str, Compared]]) -> str:
    """Blocks by config, then what has a config of its own. An entry: the largest error, and of how many outputs."""
    columns = [*KINDS.values(), *FLOWS.values(), *flux_reference.NAMES.values(), "emoji world"]
    entries: dict[tuple[str, str, float], dict[str, list[Compared]]] = {}
    alone = []
    for part, row in found:
        if row.config in columns:
            entries.setdefault((part, row.block, row.limit), {}).setdefault(row.config, []).append(row)
        else:
            alone.append(f"| {row.block} | {row.config} | {_shown([row])} | {row.limit:.0e} |")
    lines = [f"| part | block | limit | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for part, block, limit in sorted(entries, key=lambda key: PARTS.index(key[0])):
        shown = [_shown(entries[part, block, limit].get(column, [])) for column in columns]
        lines.append(f"| {part} | {block} | {limit:.0e} | {' | '.join(shown)} |")
    lines += ["", "| | shape or config | error | limit |", "|---|---|---|---|", *alone]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    over = sum(not row.error <= row.limit for _, row in found)
    summary = f"{len(found)} comparisons, {over} over their limit; {versions}, {jax.default_backend()}."
    return "\n".join([*lines, "", summary, ""])


def _shown(rows: list[Compared]) -> str:
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row.error)
    error = f"below {worst.resolution:.0e}" if worst.error < worst.resolution else f"{worst.error:.1e}"
    return f"{error} ({sum(row.cases for row in rows)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5's whole UNet")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"), help="page to write the table into")
    flags = parser.parse_args()
    with jax.default_matmul_precision("highest"):
        found = [(part, row) for part, rows in comparisons(flags.full) for row in rows]
    table = markdown(found)
    print(table)
    if flags.out.exists():
        above = flags.out.read_text(encoding="utf-8").partition(MARKER)[0]
        flags.out.write_text(above + MARKER + "\n" + table, encoding="utf-8")
    raise SystemExit(any(not row.error <= row.limit for _, row in found))


if __name__ == "__main__":
    main()
