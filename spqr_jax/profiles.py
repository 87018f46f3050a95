"""The paper's benign fine-tuning profiles as boolean masks over parameters (section 4.1, Table C)."""

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import LORA_LEAF
from spqr_jax.params import Params
from spqr_jax.protocols import PROFILES


def mask(params: Params, profile: str) -> Params:
    """The leaves that a profile trains: a tree of bool with the structure of `params`.

    params: the weights of a denoiser, or of all components of a pipeline. The profiles are

    - lite: the adapters, if they are attached (`spqr_jax.training.lora.attach`), else the kernels that receive one;
    - moderate: the key, value and output projections of cross-attention, or of the text in joint attention;
    - standard: every parameter of the denoiser.

    Of text encoders that stand beside a denoiser's own weights (`spqr_jax.backbones.Denoiser`), "lite" trains the
    adapters. Otherwise text encoders are not trained, and the autoencoder never is. Raises ValueError for an unknown
    profile, and for one that matches no parameter.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is unknown; expected one of {', '.join(PROFILES)}.")
    denoisers = tuple(f"{backbone.denoiser}." for backbone in backbones.BACKBONES if backbone.denoiser in params)
    regions, paths = backbones.regions(params), list(params_lib.flatten(params))
    adapted = any(LORA_LEAF.search(path) for path in paths)
    region = regions.lora if profile == "lite" else regions.cross_attention_projections
    component = next((prefix for prefix in denoisers), "")

    def trained(path: str) -> bool:
        if denoisers and not path.startswith(denoisers):
            return False
        path = path.removeprefix(component)
        if regions.buffers and regions.buffers.search(path):
            return False
        if profile == "lite" and adapted:
            return bool(LORA_LEAF.search(path))
        in_region = profile == "standard" or bool(region and region.search(path))
        return in_region and not LORA_LEAF.search(path)

    flags = {path: trained(path) for path in paths}
    if not any(flags.values()):
        raise ValueError(f"profile {profile!r} matches no parameter; is this a denoiser with cross-attention?")
    return params_lib.unflatten(flags)
