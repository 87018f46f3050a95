"""The kinds of files that hold tensors. A file's keys alone show its kind."""

import re
from collections.abc import Iterable

PIPELINE = "pipeline"
LORA = "LoRA"
SPM = "SPM adapter"
COMPVIS = "CompVis checkpoint"
UNET = "UNet"
TRANSFORMER = "transformer"
VAE = "VAE"
TEXT_ENCODER = "text encoder"
UNKNOWN = "unknown"

# A container comes before its contents. The first kind with a matching key is the file's.
_PATTERNS = {
    LORA: r"lora_(A|B|up|down|mid|unet|te\d?)\b|^lora_(unet|te\d?)_|[._]lora(_linear_layer)?\.(up|down)\."
    r"|\.(hada_w|lokr_w|dora_scale|lora_magnitude)",
    COMPVIS: r"^(model\.diffusion_model|model_ema|first_stage_model)\.|^(input_blocks|middle_block|output_blocks)\."
    r"|^(joint_blocks|x_embedder\.proj|t_embedder|y_embedder|text_encoders)\.",
    TRANSFORMER: r"^(module\.)?(transformer\.)?((single_)?transformer_blocks|double_blocks|single_blocks)\.\d"
    r"|^(module\.)?(transformer\.)?(time_text_embed|pos_embed\.proj|context_embedder|norm_out\.linear|proj_out)\.",
    UNET: r"^(module\.)?(unet\.)?(down_blocks|up_blocks|mid_block|(conv_in|conv_out|conv_norm_out|time_embedding"
    r"|add_embedding)(?=\.))",
    VAE: r"^(vae\.)?(encoder|decoder)\.(down|up|mid|conv_)",
    TEXT_ENCODER: r"(^|\.)text_model\.|\.SelfAttention\.|self_attn\.q_proj|(^|\.)resblocks\.\d+\.attn\.in_proj"
    r"|^embeddings\.token_embedding\.",
}


def kind_of(keys: Iterable[str]) -> str:
    """One of the kinds above; UNKNOWN if no key matches."""
    names = list(keys)
    for kind, pattern in _PATTERNS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return UNKNOWN


def hint(keys: Iterable[str]) -> str:
    """A sentence for an error: the kind that the file looks like, and how to pass such a file. "" if it is unknown."""
    kind = kind_of(keys)
    if kind == UNKNOWN:
        return ""
    looks = f" It looks like {article(kind)}."
    if kind == COMPVIS:
        return looks + " Pass it by itself as the source."
    return looks + " Pass it by itself as the source, with base=... naming the pipeline it belongs to."


def article(kind: str) -> str:
    """The kind with its article: "a UNet", "an SPM adapter"."""
    return f"{'an' if kind == SPM else 'a'} {kind}"
