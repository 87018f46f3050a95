"""Parts of a denoiser that several methods train, as trees of bool like its weights."""

from typing import Any

import jax

from spqr_jax import params as params_lib
from spqr_jax.backbones import Backbone
from spqr_jax.params import Params


def everything(weights: Params) -> Params:
    """Every weight."""
    return jax.tree.map(lambda _: True, weights)


def trained(backbone: Backbone, weights: Params, variant: str, method: str = "ESD") -> Params:
    """The weights that a variant of ESD trains; `method` is named in errors.

    "esd-x": every parameter of cross-attention. "esd-u": everything else but the time embedding (in SDXL also the added
    one) and the output layers. They are `xattn` and `noxattn` in the code of 2023.
    """
    if variant not in ("esd-x", "esd-u"):
        raise ValueError(f'ESD method must be "esd-x" or "esd-u", found {variant!r}.')
    cross, frame = (backbone.require(region, method) for region in ("cross_attention", "frame"))

    def flag(path: str, _: Any) -> bool:
        return bool(cross.search(path)) if variant == "esd-x" else not (cross.search(path) or frame.search(path))

    return params_lib.map_with_path(flag, weights)
