"""Pictures to forget and to retain, made by the base model itself and kept as latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spqr_jax import data, latents
from spqr_jax import generate as generate_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.methods.learning import check_at_least
from spqr_jax.pipeline import Pipeline


@dataclass(frozen=True)
class Pictures:
    """N captioned pictures as latent distributions.

    Attributes:
        mean, std: float32 [N, h, w, C] of the scaled latents.
        prompt: int [N], which of the prompts shows picture n.
        context: float32 [P, L, E], text states of the prompts' captions.
    """

    mean: np.ndarray
    std: np.ndarray
    prompt: np.ndarray
    context: np.ndarray

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """mean, std [B, h, w, C] and context [B, L, E] of these pictures."""
        return {"mean": self.mean[rows], "std": self.std[rows], "context": self.context[self.prompt[rows]]}


def make(
    pipeline: Pipeline,
    prompts: Sequence[str],
    count: int,
    *,
    seed: int,
    captions: Sequence[str] | None = None,
    least: int = 1,
    name: str = "pictures",
    steps: int = 50,
    guidance: float = 7.5,
    scheduler: str = "ddim",
) -> Pictures:
    """`count` pictures of `prompts`, each prompt as often as any other, one more at most; encoded once.

    captions: for each prompt what its pictures are captioned with (default: the prompt). Which prompt a picture shows
    and its noise depend on `seed` and its number alone. Raises ValueError, before any work, for fewer than `least`.
    """
    check_at_least(name, images=(count, least))
    captions = list(prompts if captions is None else captions)
    order = _order(len(prompts), count, seed)
    texts = [prompts[i] for i in order]
    images = generate_lib.generate(pipeline, texts, seed, steps=steps, guidance=guidance, scheduler=scheduler)
    encoded = latents.encode(pipeline, data.from_arrays(images, texts, name))
    scale = np.float32(pipeline.configs["vae"].get("scaling_factor", 0.18215))
    context = np.asarray(pipeline_lib.encode_prompts(pipeline, captions).context)
    return Pictures(encoded.mean * scale, np.exp(0.5 * encoded.logvar) * scale, order, context)


def rows(pictures: Pictures, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the pictures in each of `steps` batches: every epoch a new permutation drawn from `seed`."""
    return data.sample_order([len(pictures)], batch, steps, seed)


def _order(prompts: int, count: int, seed: int) -> np.ndarray:
    """Prompt numbers [count]: one permutation after another, so that a small set covers as many prompts as it can."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(prompts) for _ in range(-(-count // prompts))])[:count]
