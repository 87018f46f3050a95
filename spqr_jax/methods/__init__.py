"""Safety alignment methods: one file each, with a function `align(pipeline, concept, *, seed, ...) -> Pipeline`.

A method turns a pipeline into a safer one. It may know backbones, training and sampling, and makes its images with
`spqr_jax.generate`; it knows nothing of configs, runs, judges or scores. What methods share is in `tools`.

Options that mean the same in every method that has them:
    seed: of everything that is drawn at random.
    progress: whether to show a progress bar.
    images: the number of images to learn from.
    pictures, retain_pictures: data sources (docs/data.md) of images that show the concept, and of benign ones, which
        are used instead of images that the pipeline makes.
    steps, batch_size, lr: of training; the steps of the optimiser, samples a step, and the learning rate.
    sampling_steps, sampling_guidance: of the samples that a method draws while it works.
"""

from spqr_jax.concepts import Concept
from spqr_jax.methods import (
    advunlearn,
    erasediff,
    esd,
    fmn,
    mace,
    modular_lora,
    none,
    rece,
    resalign,
    safety_dpo,
    salun,
    scissorhands,
    sld,
    spm,
    stereo,
    uce,
)
from spqr_jax.methods.base import Method, defaults, imported, options

# The methods that a config may name. A new method adds its module here.
METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (
        none,
        uce,
        rece,
        esd,
        sld,
        modular_lora,
        mace,
        spm,
        fmn,
        salun,
        erasediff,
        scissorhands,
        stereo,
        advunlearn,
        resalign,
        safety_dpo,
    )
}

__all__ = ["METHODS", "Concept", "Method", "defaults", "find", "options"]


def find(name: str) -> Method:
    """The method of this name: one of METHODS, or a function of your own by its dotted path, as "my_lab.erase".

    A path is imported when it is named (`base.imported`). Raises ValueError, in one line, for any other name and for a
    path at which there is no method.
    """
    if name in METHODS:
        return METHODS[name]
    parts = name.split(".")
    if len(parts) > 1 and all(part.isidentifier() for part in parts):
        return imported(name)
    raise ValueError(
        f"method {name!r} is unknown; expected one of {', '.join(METHODS)}, or the dotted path of a function of your "
        "own, as my_lab.erase."
    )
