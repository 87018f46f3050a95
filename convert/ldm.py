"""From the names of the original code (CompVis, Stability) to diffusers' names.

One file holds every component under a prefix of its own. Inside a component the original code numbers all blocks in one
row, where diffusers nests them.
"""

import re
from collections.abc import Callable
from typing import Any

from convert import bfl, kinds, mmdit
from convert.families import COMPONENTS

# Prefix in the file -> component.
PREFIXES = {prefix: name for name, component in COMPONENTS.items() for prefix in component.prefixes}
EMA = re.compile(r"^model_ema\.|^model_ema$")
# Buffers of the training code: noise schedules, counters, losses, CLIP's logit scale.
IGNORED = re.compile(
    r"^(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|logvar|lvlb_weights|scale_factor"
    r"|denoiser\.sigmas|global_step|v_pred|ztsnr|first_stage_model\.loss\..+)$"
    r"|^(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(model\.|transformer\.)?"
    r"(logit_scale|attn_mask)$"
)

_UNET_TOP = (
    (re.compile(r"^time_embed\.0\."), "time_embedding.linear_1."),
    (re.compile(r"^time_embed\.2\."), "time_embedding.linear_2."),
    (re.compile(r"^label_emb\.0\.0\."), "add_embedding.linear_1."),
    (re.compile(r"^label_emb\.0\.2\."), "add_embedding.linear_2."),
    (re.compile(r"^input_blocks\.0\.0\."), "conv_in."),
    (re.compile(r"^out\.0\."), "conv_norm_out."),
    (re.compile(r"^out\.2\."), "conv_out."),
)
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_UNET_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)$")
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def component_of(key: str) -> tuple[str, str]:
    """(component, key without its prefix); ("", key) for an unknown prefix. A denoiser's names need no prefix."""
    if bfl.is_key(key):
        return "transformer", key.removeprefix(bfl.PREFIX)
    for prefix, component in PREFIXES.items():
        if key.startswith(prefix):
            rest = key[len(prefix) :]
            return ("transformer" if component == "unet" and mmdit.KEY.match(rest) else component), rest
    if mmdit.KEY.match(key):
        return "transformer", key
    if any(pattern.match(key) for pattern, _ in _UNET_TOP) or _UNET_BLOCK.match(key):
        return "unet", key
    return "", key


def namer(component: str, config: dict[str, Any]) -> Callable[[str], str]:
    """A function from the keys of a UNet or VAE, with or without prefix, to diffusers' names."""
    if COMPONENTS[component].kind == kinds.UNET:
        return lambda key: unet_name(component_of(key)[1], config["layers_per_block"])
    return lambda key: vae_name(component_of(key)[1], len(config["block_out_channels"]))


def unet_name(key: str, layers_per_block: int) -> str:
    """A CompVis UNet key without prefix -> diffusers' key. An unknown key stays as it is.

    input_blocks numbers conv_in, then the layers and the downsampler of each block. output_blocks numbers one layer
    more per block; the upsampler follows the last layer under the same number.
    """
    for pattern, name in _UNET_TOP:
        if pattern.match(key):
            return pattern.sub(name, key)
    match = _UNET_BLOCK.match(key)
    if match is None:
        return key
    part, number, rest = match[1], int(match[2]), match[3]
    if part == "middle_block":
        return f"{_MIDDLE[match[2]]}.{_resnet(rest)}" if match[2] in _MIDDLE else key
    block, layer = divmod(number - (part == "input_blocks"), layers_per_block + 1)
    direction = "down" if part == "input_blocks" else "up"
    inner, _, leaf = rest.partition(".")
    if leaf.startswith(("op.", "conv.")):
        sampler = "downsamplers" if direction == "down" else "upsamplers"
        return f"{direction}_blocks.{block}.{sampler}.0.conv.{leaf.partition('.')[2]}"
    if inner not in ("0", "1"):
        return key
    kind = ("resnets", "attentions")[int(inner)]
    return f"{direction}_blocks.{block}.{kind}.{layer}.{_resnet(leaf) if inner == '0' else leaf}"


def _resnet(rest: str) -> str:
    """The rest of a key inside a residual block. Attention layers have the same names in both."""
    for old, new in _RESNET.items():
        if rest == old or rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest


def vae_name(key: str, blocks: int) -> str:
    """A CompVis VAE key without prefix -> diffusers' key. blocks: number of resolutions (the decoder counts down)."""
    key = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", key)
    key = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", key)
    up = re.match(r"^decoder\.up\.(\d+)\.(block|upsample)\.(.+)$", key)
    if up:
        inner = "resnets." if up[2] == "block" else "upsamplers.0."
        key = f"decoder.up_blocks.{blocks - 1 - int(up[1])}.{inner}{up[3]}"
    key = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    attention = re.match(r"^(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)$", key)
    if attention:
        key = f"{attention[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(attention[2], attention[2])}.{attention[3]}"
    return key.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def is_vae_key(key: str) -> bool:
    """Whether only the original VAE code uses such a name."""
    return bool(re.match(r"^(encoder\.down|decoder\.up|encoder\.mid|decoder\.mid)\.", key))


def kohya_name(name: str, layers_per_block: int) -> str:
    """A UNet layer's CompVis name -> diffusers' name, both with underscores in place of dots."""
    dotted = re.sub(r"_(\d+)(?=_|$)", r".\1", name)
    dotted = re.sub(r"(\.\d+)_", r"\1.", dotted)
    return unet_name(f"{dotted}.", layers_per_block).removesuffix(".").replace(".", "_")
