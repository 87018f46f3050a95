"""Disk and host memory of the emoji world against counts by hand, and what of a run is not compiled."""

import dataclasses
import functools

import jax

from configs import adaptations_mini
from configs import mini as mini_config
from spqr_jax import params as params_lib
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.config import Attack, Subject
from spqr_jax.fit import flop, programs, storage, targets, work
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
    drawn = "images and samples that methods draw"
    assert programs.left_out(plan().config, []) == [drawn, "judges"]
    subjects = Subject("a", "sld"), Subject("b", "spm"), Subject("c", "modular_lora", checkpoint="weights")
    found = programs.left_out(dataclasses.replace(plan().config, subjects=subjects), ["mine, which refuses"])
    attached = "sampling with what spm may attach"
    assert found == ["aligning steps of mine, which refuses", drawn, attached, "judges"]
    attacked = dataclasses.replace(plan().config, attacks=(Attack("P4D, short", "p4d"), Attack("Words", "inversion")))
    assert programs.left_out(attacked, []) == [drawn, "searches of P4D, short and Words", "judges"]


def test_safe_latent_diffusion_is_sampled_with_its_third_text():
    plain, safe = (make(plan(), 2).trace().jaxpr.jaxpr for make in (programs.whole_sampler, programs.safe_sampler))
    assert 1.3 < flop.flop(safe) / flop.flop(plain) <= 1.5  # three evaluations in the place of two, and the decoder


def test_adaptations_are_counted_and_an_adapter_of_a_file_trains_nothing():
    found = protocol.resolve(adaptations_mini.get_config())
    whole = plan()._replace(config=found)
    sizes = {profile: programs.step(whole, profile).trainable for profile in programs.trained(found)}
    assert list(sizes) == [profile for profile in adaptations_mini.PROFILES if profile != "adapter:public"]
    sizes = {profile: params_lib.count(leaves) for profile, leaves in sizes.items()}
    kernels = params_lib.flatten(plan().pipeline.params["unet"])
    adapted = [leaf.shape for path, leaf in kernels.items() if STABLE_DIFFUSION.regions.lora.search(path)]
    assert sizes["dora"] - sizes["lite"] == sum(out for _, out in adapted)
    assert sizes["dreambooth"] == sizes["standard"] and sizes["textual_inversion"] == 128
    assert sizes["lora_text"] - sizes["lite"] == 2 * 4 * found.bft.rank * (128 + 128)  # two layers of width 128
    disk = [item["what"] for item in storage.needed(whole)["disk"]["items"]]
    assert "trained parameters of a cell, dora" in disk and not any("adapter:" in what for what in disk)
    steps = {"lite": 13, "standard": 130, "lora_text": 13, "dora": 13, "dreambooth": 100, "textual_inversion": 100}
    assert work.of(found).steps == {profile: 3 * count for profile, count in steps.items()} | {"adapter:public": 0}
