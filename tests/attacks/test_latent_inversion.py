"""Latent inversion: a step backwards against PyTorch, the picture drawn again, its budget, what cannot be inverted."""

import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax.attacks import latent_inversion
from spqr_jax.backbones import Condition
from spqr_jax.concepts import Concept
from spqr_jax.generate import generate
from spqr_jax.params import flatten, unflatten
from spqr_jax.sampling import partial
from spqr_jax.sampling.guidance import Guided

torch = pytest.importorskip("torch")
from tests import stand_in

CAT = Concept("cat", ("cat", "nude"))
PROMPTS = ("a cat do", "nude dog")
BUDGET = {"steps": 10, "rounds": 4, "guidance": 2.0, "image_steps": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def attacked(pipeline):
    return latent_inversion.attack(pipeline, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)


@pytest.mark.parametrize("rounds", [1, 3])
def test_steps_backwards_equal_pytorch(pipeline, rounds):
    """Two of two steps, the inverse of DDIM written out: x0 and noise read from the noisier latents of each round."""
    sampler = partial.sampler(pipeline, 2, 3.0)
    text, empty = (np.asarray(backbones.condition(pipeline, [said]).context) for said in ("a cat", ""))
    given = Guided(Condition(text), Condition(empty), np.full(1, 3, np.float32))
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    weights = pipeline.params["unet"]
    ours = latent_inversion.inverted(sampler.denoiser, weights, sampler.tables, latents, given, True, rounds)
    unet = stand_in.torch_unet({p: x.detach() for p, x in stand_in.tensors(weights).items()})
    powers, after = torch.tensor(np.asarray(backbones.schedule(pipeline))), torch.tensor(latents)
    for t, then in zip(sampler.tables.timesteps[::-1].tolist(), (0, 1), strict=True):  # set_alpha_to_one is False
        power, next_power = powers[t], powers[then]
        before = after
        for _ in range(rounds):
            without, with_text = (unet(before, torch.tensor([t]), torch.tensor(said)) for said in (empty, text))
            noise = without + 3 * (with_text - without)
            # after = sqrt(next) (x - sqrt(1 - abar) noise) / sqrt(abar) + sqrt(1 - next) noise, for x
            clean = (after - (1 - next_power).sqrt() * noise) / next_power.sqrt()
            before = power.sqrt() * clean + (1 - power).sqrt() * noise
        after = before
    np.testing.assert_allclose(ours, after.numpy(), rtol=1e-3, atol=1e-4)


def test_the_picture_is_drawn_again_from_what_is_found(pipeline, attacked):
    """By `generate`, with the same steps and guidance, and DDIM that clips nothing."""
    scheduler = {**pipeline.configs["scheduler"], "clip_sample": False}
    plain = pipeline._replace(configs={**pipeline.configs, "scheduler": scheduler})
    images = [
        generate(plain, PROMPTS, [0, 1], steps=10, guidance=2.0, scheduler="ddim", latents=latents)
        for latents in (attacked.latents, None)
    ]
    encoder = pipeline.definitions["vae"].bind({})
    for row, prompt in enumerate(PROMPTS):
        own = int(latent_inversion.base.generator(1, prompt).integers(2**31))
        (wanted,) = latent_inversion.base.pictures(pipeline, [prompt], [own], 2, 7.5)
        again, other = (
            np.asarray(encoder.encode(np.asarray(found[row : row + 1] / 127.5 - 1, np.float32))[0]) * 0.18215
            for found in images
        )
        assert np.abs(again - wanted).mean() < 0.5 * np.abs(other - wanted).mean()


def test_more_rounds_come_closer(pipeline):
    few, many = (
        latent_inversion.attack(pipeline, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET | {"rounds": rounds})
        for rounds in (1, 6)
    )
    assert (many.loss < 0.5 * few.loss).all()


def test_prompts_stay_and_the_budget_is_counted(attacked):
    assert attacked.prompts == PROMPTS and attacked.latents.shape == (2, 8, 8, 4)
    assert attacked.queries == len(PROMPTS) * 10 * 4 and np.isfinite(attacked.loss).all()


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, attacked):
    alone = latent_inversion.attack(pipeline, PROMPTS[1:], CAT, seed=1, target=pipeline, **BUDGET)
    np.testing.assert_array_equal(alone.latents, attacked.latents[1:])
    assert alone.loss.tolist() == attacked.loss[1:].tolist()


def test_one_program_serves_all_prompts_and_pipelines(pipeline, compilations):
    latent_inversion.attack(pipeline, ("a dog",), CAT, seed=5, target=pipeline, **BUDGET | {"rounds": 2})
    assert compilations  # the counter counts
    unet = unflatten({path: 0.9 * np.asarray(leaf) for path, leaf in flatten(pipeline.params["unet"]).items()})
    subject = pipeline.with_params(unet=unet)
    compilations.clear()
    latent_inversion.attack(subject, ("de", "a cat"), CAT, seed=6, target=pipeline, **BUDGET | {"rounds": 2})
    assert not compilations


def test_weights_that_give_no_finite_loss_leave_noise(pipeline):
    broken = {path: np.full_like(leaf, np.nan) for path, leaf in flatten(pipeline.params["unet"]).items()}
    subject = pipeline.with_params(unet=unflatten(broken))
    failed = latent_inversion.attack(subject, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)
    assert np.isnan(failed.loss).all() and np.isfinite(failed.latents).all() and 0.8 < failed.latents.std() < 1.2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "Latent inversion: steps=0, expected at least 1"),
        ({"rounds": 0}, "rounds=0, expected at least 1"),
        ({"target": None}, "needs `target`"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"prompts": ()}, "no prompts"),
    ],
)
def test_bad_input(pipeline, change, match):
    given = {"pipeline": pipeline, "prompts": PROMPTS, "concept": CAT, "seed": 0, "target": pipeline} | BUDGET
    with pytest.raises(ValueError, match=match):
        latent_inversion.attack(**given | change)
