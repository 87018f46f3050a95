"""SLD, Safe Latent Diffusion (Schramowski et al., CVPR 2023): guidance away from unsafe content, at generation only."""

from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools.concepts import checked, require_tokens
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.attached import attach
from spqr_jax.sampling.attached.safe_guidance import PRESETS, SLD, UNSAFE, Strength


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    preset: str = "medium",
    text: str | None = None,
    strength: dict[str, float] | None = None,
    progress: bool = False,
) -> Pipeline:
    """Attach safety guidance; no weight changes, and fine-tuning leaves it attached. `seed` and `progress` are not
    used.

    Args:
        preset: "weak", "medium", "strong" or "max", the paper's configurations.
        text: what images are guided away from. Default: the published list for the presets "nudity" and "nsfw", else
            "an image showing " and the concept's texts.
        strength: fields of `spqr_jax.sampling.attached.safe_guidance.Strength` that replace the preset's.

    The guidance is the authors' (and diffusers' StableDiffusionPipelineSafe): the warm-up counts evaluations of the
    UNet, momentum builds up during it, and images without classifier-free guidance are not guided. Raises ValueError
    for SDXL, an unknown preset, a scale of 1 and below, which turns the authors' guidance off, and a text without
    tokens or with more than the text encoder reads.
    """
    del seed, progress
    concept = checked(concept, pipeline)
    METHOD.check_backbone(pipeline)
    if preset not in PRESETS:
        raise ValueError(f"SLD preset {preset!r} is unknown; expected one of {', '.join(PRESETS)}.")
    unknown = set(strength or {}) - set(Strength._fields)
    if unknown:
        raise ValueError(f"SLD strength has no {sorted(unknown)}; expected some of {', '.join(Strength._fields)}.")
    numbers = PRESETS[preset]._replace(**(strength or {}))
    if numbers.scale <= 1:
        raise ValueError(f"SLD scale must be above 1 (at 1 and below guidance is off), found {numbers.scale}.")
    published = text is None and concept.name in ("nudity", "nsfw")
    text = UNSAFE if published else _checked_text(pipeline, concept, text)
    return attach(pipeline, SLD(text, numbers))


def _checked_text(pipeline: Pipeline, concept: Concept, text: str | None) -> str:
    """The text, or all of the concept's in one. It must say something (guidance away from nothing does nothing), and
    nothing of it may be cut off."""
    text = f"an image showing {', '.join(concept.erase)}" if text is None else text
    length = pipeline.configs["text_encoder"]["max_position_embeddings"]
    require_tokens("SLD", "text", [text], pipeline)
    needed = len(pipeline.tokenizers["tokenizer"](text).input_ids)
    if needed > length:
        raise ValueError(
            f"SLD: the text to guide away from ({len(concept.erase)} texts of concept {concept.name!r}, or `text`) "
            f"takes {needed} tokens, the text encoder reads {length}; set a shorter `text`."
        )
    return text


METHOD = Method("sld", "SLD", align, backbones=("sd", "sd3"))
