"""The paper's benign fine-tuning profiles as boolean masks over parameters (section 4.1, Table C)."""

import re

from spqr_jax import params as params_lib
from spqr_jax.params import Params

# lite: adapters on these projections of every attention layer of the UNet.
LORA_TARGETS = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.kernel$")
CROSS_ATTENTION = re.compile(r"\.attn2\.(to_k|to_v|to_out\.0)\.(kernel|bias)$")
LORA_LEAF = re.compile(r"\.lora_[AB]\.kernel$")
PROFILES = ("lite", "moderate", "standard")


def mask(params: Params, profile: str) -> Params:
    """Which leaves a profile trains: a pytree of bool shaped like `params` (a UNet's, or a pipeline's components).

    lite: the LoRA leaves once adapters are attached (`spqr_jax.training.lora.attach`), before that the kernels that
    receive one.
    moderate: attn2.to_k, attn2.to_v, attn2.to_out. standard: every UNet parameter. The text encoder and the VAE are
    never trained. Raises ValueError for an unknown profile or one that matches no parameter.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is unknown; expected one of {', '.join(PROFILES)}.")
    paths = list(params_lib.flatten(params))
    adapted = any(LORA_LEAF.search(path) for path in paths)

    def trained(path: str) -> bool:
        if "unet" in params and not path.startswith("unet."):
            return False
        if profile == "lite":
            return bool((LORA_LEAF if adapted else LORA_TARGETS).search(path))
        is_base = not LORA_LEAF.search(path)
        return is_base and (profile == "standard" or bool(CROSS_ATTENTION.search(path)))

    flags = {path: trained(path) for path in paths}
    if not any(flags.values()):
        raise ValueError(f"profile {profile!r} matches no parameter; is this a UNet with cross-attention?")
    return params_lib.unflatten(flags)
