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

from judges import plugins
from spqr_jax.concepts import Concept
from spqr_jax.methods import (
    advunlearn,
    eraseanything,
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
from spqr_jax.methods.base import Method, defaults, imported, offered, options

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
        eraseanything,
    )
}

__all__ = ["METHODS", "Concept", "Method", "defaults", "find", "options"]


def find(name: str) -> Method:
    """The method of this name: one of METHODS, a plug-in, or a function of your own by its dotted path, "my_lab.erase".

    A plug-in is what an installed distribution offers in the entry-point group "spqr_jax.methods". It and a path are
    imported when they are named (`base.offered`, `base.imported`), and neither takes the place of one of METHODS.
    Raises ValueError, in one line, for any other name and for a plug-in or a path at which there is no method.
    """
    if name in METHODS:
        plugins.warn_if_refused(plugins.METHODS, name)
        return METHODS[name]
    if method := offered(name):
        return method
    if plugins.is_dotted(name):
        return imported(name)
    plugged = "".join(f", {known}" for known in plugins.offered(plugins.METHODS) if known not in METHODS)
    raise ValueError(
        f"method {name!r} is unknown; expected one of {', '.join(METHODS)}{plugged}, or the dotted path of a function "
        "of your own, as my_lab.erase."
    )
