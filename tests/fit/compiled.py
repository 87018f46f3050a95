"""Programs of a Stable Diffusion compiled for a target, and what they consist of, as a line of JSON each.

    python -m tests.fit.compiled tpu-v5e-4 small-48 bfloat16 standard evaluation decoder

"small-48" is a tiny one with latents of 48x48, so that self-attention, in its middle, has 2,304 queries; any other base
is a published one by its name. Programs are those of `MADE`; "-fsdp" behind the name splits the weights over the
devices.
"""

import os

from spqr_jax.fit.environment import ENVIRONMENT

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})

import json
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from spqr_jax.config import Config
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.fit import fitting, programs, targets
from spqr_jax.fit.fitting import Question

SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (96,),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "vae": {"block_out_channels": (32,), "norm_num_groups": 8, "latent_channels": 4},
    "text_encoder": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
    },
    "scheduler": {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"},
}
MADE = {
    "text": programs.text_encoding,
    "images": programs.image_encoding,
    **{profile: partial(programs.training_step, profile=profile) for profile in ("lite", "moderate", "standard")},
    "sampler": partial(programs.whole_sampler, each=2),
    "evaluation": partial(programs.evaluation, each=2),
    "decoder": partial(programs.decoder, each=2),
}


def question(target: str, base: str, dtype: str, fsdp: bool = False) -> Question:
    found = targets.find(target)
    config = Config(base=base, dtype=dtype)
    config.mesh.fsdp = fsdp
    config.generation.steps = 2
    if base.startswith("small-"):
        config.base = kept().name
        config.bft.batch_size = targets.mesh(found).size
        write(Path(config.base), int(base.removeprefix("small-")))
    return Question.of(fitting.protocol.resolve(config), found, fitting.Asked())


@cache
def kept() -> tempfile.TemporaryDirectory:
    """A folder that lasts as long as this process: the one that compiles reads it too."""
    return tempfile.TemporaryDirectory()


def write(folder: Path, side: int) -> None:
    """The config files of the small one; weights are not needed."""
    SMALL["unet"]["sample_size"] = side
    for name, config in SMALL.items():
        (folder / name).mkdir(exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))


def main(target: str, base: str, dtype: str, *names: str) -> None:
    for name in names:
        short = name.removesuffix("-fsdp")
        asked = question(target, base, dtype, name != short)
        row = asked.row(*asked.measure(MADE[short]))
        leaves = [leaf.size for leaf in jax.tree.leaves(asked.plan.pipeline.params["unet"])]
        print(json.dumps(row | {"name": name, "elements": sum(leaves), "leaves": len(leaves)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        mesh_lib.split_cpu(4)
    main(*sys.argv[1:])
