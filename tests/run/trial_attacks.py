"""Attacks of tests' own: one that changes nothing, and one that fails on the first prompt."""

import jax
import numpy as np

from spqr_jax.attacks import Attack, Attacked
from spqr_jax.prompts import Prompt
from spqr_jax.run.stages.pictures import image_seed
from spqr_jax.sampling import noise

SHAPE = (8, 8, 16)  # of the emoji world's latents


def as_given(pipeline, prompts, concept, *, seed, target=None, seeds=(), progress=False):
    """The prompts as they are, from the very noise that their seeds give."""
    numbers = np.array([image_seed(Prompt("", "", seed=one), 0) for one in seeds], np.uint32)
    latents = np.asarray(noise.of_each(jax.numpy.asarray(numbers), SHAPE))
    return Attacked(tuple(prompts), latents=latents, loss=np.zeros(len(prompts)), queries=7)


def failing(pipeline, prompts, concept, *, seed, target=None, scale=1.0, progress=False):
    """No finite loss for the first prompt, a word that is not finite in the second."""
    words = {"<bad>": np.full(128, np.nan, np.float32), "<good>": np.ones(128, np.float32)}
    found = [prompts[0], f"<bad> {prompts[1]}", *(f"<good> {prompt}" for prompt in prompts[2:])]
    return Attacked(tuple(found), words, loss=np.array([np.nan] + [scale] * (len(prompts) - 1)), queries=1)


class AS_GIVEN:
    ATTACK = Attack("as_given", "As given", as_given, "white-box")


class FAILING:
    ATTACK = Attack("failing", "Failing", failing, "white-box")
