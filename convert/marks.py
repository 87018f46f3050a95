"""To which class of denoiser a file belongs, by the names of its layers."""

import re
from collections.abc import Iterable

from convert.families import DENOISERS
from convert.rename import ConversionError
from spqr_jax.backbones import class_name
from spqr_jax.pipeline import Pipeline

# What only one kind of denoiser has in the names of its layers, in files of every form: class -> pattern.
MARKS = {
    "FluxTransformer2DModel": re.compile(r"(^|[._])(single_transformer_blocks|double_blocks|single_blocks)[._]\d"),
    "SD3Transformer2DModel": re.compile(r"(^|[._])joint_blocks[._]\d"),
    "UNet2DConditionModel": re.compile(r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)[._]"),
}


def check(pipeline: Pipeline, keys: Iterable[str], source: str) -> None:
    """Raise ConversionError if a file of a denoiser, or of adapters of one, is marked as belonging to another class."""
    names, denoiser = list(keys), next(name for name in DENOISERS if name in pipeline.configs)
    expected = class_name(denoiser, pipeline.configs[denoiser])
    found = next((name for name, mark in MARKS.items() if any(mark.search(key) for key in names)), expected)
    if found != expected:
        raise ConversionError(
            f"{source} belongs to a {found}, and {pipeline.name} has a {expected}; pass a pipeline of the same family "
            "with base=...."
        )
