"""Disk and host memory of the emoji world against counts by hand, and what of a run is not compiled."""

import dataclasses
import functools

import jax

from configs import mini as mini_config
from spqr_jax.config import Subject
from spqr_jax.fit import flop, programs, storage, targets
from spqr_jax.fit.fitting import Asked, Question
from spqr_jax.run import protocol


@functools.cache
def plan():
    config = protocol.resolve(mini_config.get_config())
    config = dataclasses.replace(config, bft=dataclasses.replace(config.bft, profiles=("standard",)))
    return Question.of(config, targets.find("cpu"), Asked()).plan


def counts(needed):
    assert needed["bytes"] == sum(item["number"] * item["bytes"] for item in needed["items"])
    return [(item["number"], item["bytes"]) for item in needed["items"]]


def test_disk_and_host_memory_of_the_emoji_world():
    """Four subjects, one profile: 300 prompts, images of 32x32 before and after; 200 training images, cut anew in
    ten passes, latents 16x16."""
    needed = storage.needed(plan())
    every = sum(leaf.size for leaf in jax.tree.leaves(plan().pipeline.params)) * 4
    unet = sum(leaf.size for leaf in jax.tree.leaves(plan().pipeline.params["unet"])) * 4
    latent = 2 * 16 * 16 * 4 * 4
    assert counts(needed["disk"]) == [(2400, 32 * 32 * 3), (2000, latent), (3, every), (4, unet), (2, 3 * unet)]
    assert counts(needed["host"]) == [(2, every), (2, every), (200, latent), (1, 3 * unet)]


def test_what_is_not_compiled_is_named():
    def left_out(*subjects):
        return programs.left_out(dataclasses.replace(plan().config, subjects=subjects))

    assert programs.left_out(plan().config) == ["aligning steps of esd", "judges"]
    subjects = Subject("a", "sld"), Subject("b", "spm"), Subject("c", "esd", checkpoint="weights")
    assert left_out(*subjects) == ["aligning steps of spm", "sampling with what spm may attach", "judges"]


def test_safe_latent_diffusion_is_sampled_with_its_third_text():
    plain, safe = (make(plan(), 2).trace().jaxpr.jaxpr for make in (programs.whole_sampler, programs.safe_sampler))
    assert 1.3 < flop.flop(safe) / flop.flop(plain) <= 1.5  # three evaluations in the place of two, and the decoder
