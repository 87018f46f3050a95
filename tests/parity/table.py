"""The parity table: every block type, whole models and whole samples against PyTorch, with the error of each.

    python -m tests.parity.table [--full] [--out docs/parity.md]

Prints the table and writes it into the page, below its marker. The comparisons are the tests' own. `--full` adds Stable
Diffusion 1.5's whole UNet (8 GiB of memory). Exit status 1 if a row is over its limit.
"""

import argparse
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import torch

import convert
from spqr_jax import mini
from tests import conftest
from tests.parity import blocks, compared, samples
from tests.parity.compared import Compared

KINDS = {"sd1": "tiny SD1", "sd2": "tiny SD2", "sdxl": "tiny SDXL"}
PROMPTS = ["a cat", "nude", ""]
MARKER = "<!-- Written by python -m tests.parity.table; edit above. -->\n"
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def comparisons(full: bool) -> Iterator[list[Compared]]:
    """All rows, a model at a time."""
    yield compared.formulations()
    for kind, name in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = conftest.torch_pipeline(kind)
            pipe.save_pretrained(folder)
            pair = pipe, convert.load(folder)
            yield blocks.of_unet(*pair, name)
            if kind == "sd1":  # the others' VAE has the same layers
                yield blocks.of_vae(*pair, name)
                yield compared.unet(*pair, name, side=(9, 7))
            yield blocks.of_text_encoders(*pair, name, PROMPTS)
            yield compared.unet(*pair, name) + compared.vae(*pair, name)
            yield compared.text_encoders(*pair, name, PROMPTS)
            for scheduler in samples.SCHEDULERS:
                yield samples.sample(pipe, Path(folder), name, scheduler)
    yield emoji_world()
    if full:
        yield compared.sd15_unet()


def emoji_world() -> list[Compared]:
    """The shipped model, trained weights, read by both from the same directory."""
    path = mini.model_path()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path, local_files_only=True, torch_dtype=torch.float32)
    pair, name = (pipe, convert.load(path)), "emoji world"
    return (
        blocks.of_unet(*pair, name)
        + compared.unet(*pair, name)
        + compared.vae(*pair, name)
        + compared.text_encoders(*pair, name, [p.prompt for p in mini.prompts("benign", 4, 0)])
    )


def markdown(rows: list[Compared]) -> str:
    """One line a block and config, in the order compared."""
    lines = ["| block | config | cases | error | limit |", "|---|---|---|---|---|"]
    lines += [f"| {r.block} | {r.config} | {r.cases} | {r.error:.1e} | {r.limit:.0e} |" for r in rows]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    over = sum(not row.error <= row.limit for row in rows)
    return "\n".join(
        [*lines, "", f"{len(rows)} rows, {over} over their limit; {versions}, {jax.default_backend()}.", ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5's whole UNet")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"), help="page to write the table into")
    flags = parser.parse_args()
    rows: list[Compared] = []
    with jax.default_matmul_precision("highest"):
        for more in comparisons(flags.full):
            rows += more
    table = markdown(rows)
    print(table)
    if flags.out.exists():
        above = flags.out.read_text(encoding="utf-8").partition(MARKER)[0]
        flags.out.write_text(above + MARKER + "\n" + table, encoding="utf-8")
    raise SystemExit(any(not row.error <= row.limit for row in rows))


if __name__ == "__main__":
    main()
