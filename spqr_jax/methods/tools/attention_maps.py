"""Cross-attention maps of a UNet and tokens of a text, for methods that suppress attention to a concept's tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import pipeline as pipeline_lib
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.backbones.models.unet import Attention, BasicTransformerBlock
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


class Observed(nnx.Module):
    """An attention layer that also hands its probabilities, float32 [B, heads, queries, tokens], to `record`."""

    def __init__(self, layer: Attention, record):
        self.layer, self.record = layer, record

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        # The layer computes these again without keeping them; the compiler shares what is equal.
        q, k = self.layer.to_q(x), self.layer.to_k(context)
        q, k = (t.reshape(*t.shape[:2], self.layer.heads, -1) for t in (q, k))
        scores = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32)
        self.record(jax.nn.softmax(scores / np.sqrt(q.shape[-1]), axis=-1))
        return self.layer(x, context)


def cross_attention(
    denoiser: Denoiser, weights: Params, latents: jax.Array, t: jax.Array, condition: Condition
) -> list[jax.Array]:
    """Probabilities [B, heads, queries, tokens] of every attn2 layer in one prediction, in the order of evaluation.

    The prediction itself is not used, so the compiler drops the layers after the last attention.
    """
    maps: list[jax.Array] = []
    model = denoiser.definition.bind(weights)
    for block in [m for _, m in nnx.iter_modules(model) if isinstance(m, BasicTransformerBlock)]:
        block.attn2 = Observed(block.attn2, maps.append)  # type: ignore[assignment]
    denoiser.of_model(model)(latents, t, condition)
    return maps


def positions(pipeline: Pipeline, prompt: str, text: str, *, end: bool) -> np.ndarray:
    """Which of a prompt's tokens to watch, bool [L]: those of `text` and, with `end`, every end-of-text token (in SD1.x
    that is the padding too). Raises ValueError when the text's tokens do not occur in the prompt."""
    ids = pipeline_lib.tokenize(pipeline, [prompt])[0]
    wanted = pipeline.tokenizers["tokenizer"](text, add_special_tokens=False).input_ids
    chosen = _occurrences(ids, wanted, prompt, text)
    return chosen | (ids == pipeline.tokenizers["tokenizer"].eos_token_id) if end else chosen


def positions_t5(pipeline: Pipeline, prompt: str, text: str, length: int) -> np.ndarray:
    """As `positions`, of FLUX's T5 with texts of `length` tokens. Raises ValueError for a text that is cut off too."""
    tokenizer = pipeline.tokenizers["tokenizer_2"]
    ids, wanted = (list(tokenizer(each).input_ids)[:-1] for each in (prompt, text))  # without the end of text
    chosen = np.zeros(max(length, len(ids)), bool)
    chosen[: len(ids)] = _occurrences(ids, wanted, prompt, text)
    if chosen[length - 1 :].any():  # the last one ends the text
        raise ValueError(f"the tokens of {text!r} lie behind the first {length} of {prompt!r}; shorten it.")
    return chosen[:length]


def _occurrences(ids: Sequence[int] | np.ndarray, wanted: list[int], prompt: str, text: str) -> np.ndarray:
    starts = [i for i in range(len(ids) - len(wanted) + 1) if wanted and list(ids[i : i + len(wanted)]) == wanted]
    if not starts:
        raise ValueError(f"the tokens of {text!r} do not occur in the prompt {prompt!r}; put {{}} in the template.")
    chosen = np.zeros(len(ids), bool)
    for start in starts:
        chosen[start : start + len(wanted)] = True
    return chosen
