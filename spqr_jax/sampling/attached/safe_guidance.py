"""Safe Latent Diffusion (Schramowski et al., CVPR 2023): every image is guided away from a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.backbones import Condition
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.attached.base import Prepared
from spqr_jax.sampling.guidance import Guided, Predict, predictions

# The published safety concept, the text in the authors' pipeline.
UNSAFE = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


class Strength(NamedTuple):
    """Hyperparameters of Safe Latent Diffusion. The defaults are those of its configuration "medium"."""

    warmup: float = 10  # evaluations of the denoiser before guidance acts (momentum builds up meanwhile)
    scale: float = 1000  # s_S
    threshold: float = 0.01  # lambda
    momentum_scale: float = 0.3  # s_m
    momentum_beta: float = 0.4  # beta_m, 0..1


# Schramowski et al., CVPR 2023, table of configurations.
PRESETS = {
    "weak": Strength(15, 20, 0.0, 0.0, 0.0),
    "medium": Strength(),
    "strong": Strength(7, 2000, 0.025, 0.5, 0.7),
    "max": Strength(0, 5000, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SLD:
    """Safe Latent Diffusion: every image is guided away from the text `concept`."""

    concept: str = UNSAFE
    strength: Strength = PRESETS["medium"]

    kind: ClassVar[str] = "guidance"
    in_loop: ClassVar[bool] = True
    needs_guidance: ClassVar[bool] = True

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.concept,)

    def changed(self, weights: Params) -> Params:
        return weights

    def prepare(self, pipeline: Pipeline, prompts: Sequence[str], said: Condition, own: Condition) -> Prepared:
        """As `Attachment.prepare`. Raises ValueError for SDXL, for which the authors define no guidance."""
        if own.time_ids is not None:
            raise ValueError("Safe Latent Diffusion is not defined for SDXL; detach it to sample SDXL.")
        return Prepared(SafeGuidance(), numbers=jax.tree.map(np.float32, self.strength), rows=own)

    def check(self, evaluations: int) -> None:
        if self.strength.warmup >= evaluations:
            raise ValueError(
                f"SLD acts after {self.strength.warmup:g} evaluations of the UNet, and a sample takes {evaluations}: "
                "it would never act. The presets are for 50 steps; lower the warm-up in the same proportion, with "
                'the option `strength`: {"warmup": ...}.'
            )

    def save(self, path: Path) -> dict[str, Any]:
        return {"concept": self.concept, **self.strength._asdict()}

    @classmethod
    def load(cls, path: Path, note: dict[str, Any]) -> Self:
        numbers = dict(note)
        return cls(numbers.pop("concept"), Strength(**numbers))


@dataclass(frozen=True)
class SafeGuidance:
    """Safe Latent Diffusion inside the loop. Its memory is the momentum [B, h, w, C]."""

    predicts: ClassVar[bool] = True

    def insert(self, model: Any, weights: Params, rows: Any) -> None:
        del model, weights, rows

    def start(self, latents: jax.Array) -> jax.Array:
        return jnp.zeros_like(latents)

    def predict(
        self,
        predict: Predict,
        given: Guided,
        unsafe: Condition,
        strength: Strength,
        memory: Any,
        at: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """(prediction, new momentum): negative + guidance * (positive - negative - gamma), float32.

        Images with guidance 1 keep their plain prediction, as in diffusers.
        """
        i, latents, time = at
        without, with_text, away = predictions(predict, (given.negative, given.text, unsafe), latents, time)
        gamma, memory = safety_guidance(strength, memory, i, without, with_text, away)
        scale = given.guidance[:, None, None, None]
        gamma = jnp.where(scale > 1, gamma, 0.0)
        return without + scale * (with_text - without - gamma), memory


def safety_guidance(
    strength: Strength, momentum: jax.Array, i: jax.Array, without: jax.Array, text: jax.Array, unsafe: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(gamma to subtract from the guidance direction, new momentum) at evaluation i (Schramowski et al., eq. 3-8).

    without, text, unsafe: the UNet's outputs for no text, the prompt, and the unsafe concept, all of one shape.
    momentum has the same shape, and is zero at first. gamma includes the momentum term. It is zero during the warm-up,
    as in the authors' code.
    """
    difference = text - unsafe
    weight = jnp.minimum(jnp.abs(difference) * strength.scale, 1.0)
    weight = jnp.where(difference >= strength.threshold, 0.0, weight)
    gamma = weight * (unsafe - without) + strength.momentum_scale * momentum
    momentum = strength.momentum_beta * momentum + (1 - strength.momentum_beta) * gamma
    return jnp.where(i >= strength.warmup, gamma, 0.0), momentum
