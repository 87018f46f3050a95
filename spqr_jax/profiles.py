"""Fine-tuning profiles as boolean masks over parameters: the paper's three (section 4.1, Table C), and ours."""

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import LORA_LEAF, NEW_WORDS
from spqr_jax.params import Params
from spqr_jax.protocols import PROFILES as PROFILES
from spqr_jax.protocols import TRAINED

WITH_ADAPTERS = ("lite", "dora", "lora_text")  # adapters are attached first, and merged in the end
OF_FEW_PICTURES = ("dreambooth", "textual_inversion")  # trained on some pictures of one thing, not on a scenario's data


def mask(params: Params, profile: str) -> Params:
    """The leaves that a profile trains: a tree of bool with the structure of `params`.

    params: the weights of a denoiser, or of all components of a pipeline. The paper's profiles are

    - lite: the adapters, if they are attached (`spqr_jax.training.lora.attach`), else the kernels that receive one;
    - moderate: the key, value and output projections of cross-attention, or of the text in joint attention;
    - standard: every parameter of the denoiser.

    Ours are

    - dora, lora_text: as lite. They differ in what is attached;
    - dreambooth: as standard. It differs in data and loss (`spqr_jax.training.prior`);
    - textual_inversion: the vectors of new words (`spqr_jax.training.words.attach`).

    Of text encoders that stand beside a denoiser's own weights (`spqr_jax.backbones.Denoiser`), adapters and new words
    are trained. Otherwise text encoders are not trained, and the autoencoder never is. Raises ValueError for an unknown
    profile, and for one that matches no parameter.
    """
    if profile not in TRAINED:
        raise ValueError(f"profile {profile!r} is unknown; expected one of {', '.join(TRAINED)}.")
    if profile == "textual_inversion":
        return _new_words(params)
    denoisers = tuple(f"{backbone.denoiser}." for backbone in backbones.BACKBONES if backbone.denoiser in params)
    regions, paths = backbones.regions(params), list(params_lib.flatten(params))
    adapted = any(LORA_LEAF.search(path) for path in paths)
    region = regions.lora if profile in WITH_ADAPTERS else regions.cross_attention_projections
    component = next((prefix for prefix in denoisers), "")

    def trained(path: str) -> bool:
        if denoisers and not path.startswith(denoisers):
            return False
        path = path.removeprefix(component)
        if regions.buffers and regions.buffers.search(path):
            return False
        if profile in WITH_ADAPTERS and adapted:
            return bool(LORA_LEAF.search(path))
        in_region = profile in ("standard", "dreambooth") or bool(region and region.search(path))
        return in_region and not LORA_LEAF.search(path)

    flags = {path: trained(path) for path in paths}
    if not any(flags.values()):
        raise ValueError(f"profile {profile!r} matches no parameter; is this a denoiser with cross-attention?")
    return params_lib.unflatten(flags)


def _new_words(params: Params) -> Params:
    flags = {path: bool(NEW_WORDS.search(path)) for path in params_lib.flatten(params)}
    if not any(flags.values()):
        raise ValueError("profile 'textual_inversion' matches no parameter; attach a new word to the text encoder.")
    return params_lib.unflatten(flags)
