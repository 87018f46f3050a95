"""Flow matching against diffusers: tables to the bit, whole samples, and the noising of its training scripts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from spqr_jax import schedulers
from spqr_jax.schedulers import flow
from spqr_jax.schedulers.flow import Spacing

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DEV = SD3 | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL = SD3 | {"shift": 1.0}
STEPS = [1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 25, 28, 30, 33, 37, 40, 50, 61, 64, 77, 100, 103, 250, 999, 1000]


def reference(config, steps: int, spacing: Spacing):
    """diffusers' scheduler as the pipelines of SD3 and FLUX set it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    fields = scheduler.config
    mu = None
    if fields.use_dynamic_shifting:
        mu = calculate_shift(
            spacing.tokens, fields.base_image_seq_len, fields.max_image_seq_len, fields.base_shift, fields.max_shift
        )
    given = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if spacing.by_steps else {"num_inference_steps": steps}
    scheduler.set_timesteps(**given, mu=mu)
    return scheduler


@pytest.mark.parametrize(
    ("config", "spacing"),
    [
        (SD3, Spacing()),
        (SD3 | {"shift": 1.15}, Spacing()),
        (SD3 | {"use_dynamic_shifting": True}, Spacing(tokens=1024)),
        (DEV, Spacing(tokens=256, by_steps=True)),
        (DEV, Spacing(tokens=1024, by_steps=True)),
        (DEV, Spacing(tokens=4096, by_steps=True)),
        (DEV | {"time_shift_type": "linear"}, Spacing(tokens=4096, by_steps=True)),
        (SCHNELL, Spacing(tokens=4096, by_steps=True)),
        ({}, Spacing()),
    ],
)
def test_tables_are_those_of_diffusers_to_the_bit(config, spacing):
    for steps in STEPS:
        theirs, ours = reference(config, steps, spacing), schedulers.create("flow_euler", config, steps, spacing)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
        np.testing.assert_array_equal(ours.stride, np.diff(theirs.sigmas.numpy()))


@pytest.mark.parametrize(("config", "spacing"), [(SD3, Spacing()), (DEV, Spacing(tokens=64, by_steps=True))])
@pytest.mark.parametrize("steps", [1, 8, 28])
def test_whole_samples(config, spacing, steps):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 5, 3), dtype=np.float32))
    theirs, ours = reference(config, steps, spacing), schedulers.create("flow_euler", config, steps, spacing)
    latents, state = jnp.asarray(x.numpy()) * ours.init_noise_sigma, ours.init_state(x.numpy())
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(torch.tanh(0.3 * x + t / 1000), t, x, return_dict=False)[0]
        output = jnp.tanh(0.3 * ours.scale_input(latents, i) + ours.timesteps[i] / 1000)
        latents, state = ours.step(state, output, i, latents)
        assert np.linalg.norm(latents - x.numpy()) <= 1e-6 * np.linalg.norm(x.numpy()), i


@pytest.mark.parametrize("config", [SD3, SD3 | {"shift": 1.15}, DEV, SCHNELL, {}])
def test_noise_levels_of_training(config):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    np.testing.assert_array_equal(flow.training_sigmas(config), theirs.sigmas.numpy())
    np.testing.assert_array_equal(flow.training_sigmas(config) * np.float32(1000), theirs.timesteps.numpy())


@pytest.mark.parametrize("kind", ["logit_normal", "none"])
def test_times_noise_and_target_as_in_the_training_scripts(kind):
    """examples/dreambooth/train_dreambooth_sd3.py and train_dreambooth_flux.py, given the same random values."""
    generator = torch.Generator().manual_seed(3)
    u = compute_density_for_timestep_sampling(kind, 8, logit_mean=0.3, logit_std=0.7, generator=generator)
    drawn = torch.Generator().manual_seed(3)
    normal = torch.normal(mean=0.0, std=1.0, size=(8,), generator=drawn)
    uniform = torch.rand(size=(8,), generator=torch.Generator().manual_seed(3))
    ours = flow.density(kind, normal.numpy(), uniform.numpy(), mean=0.3, std=0.7)
    np.testing.assert_allclose(ours, u.numpy(), rtol=1e-6)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    sigmas = scheduler.sigmas[(u * 1000).long()]
    found = flow.at_density(flow.training_sigmas(SD3), u.numpy())
    np.testing.assert_array_equal(found, sigmas.numpy())
    x0, noise = (np.random.default_rng(i).standard_normal((8, 4, 4, 3), dtype=np.float32) for i in (0, 1))
    scheduler.set_timesteps(10)  # scale_noise reads the levels of a sample
    noisy = flow.add_noise(found, x0, noise)
    wide = sigmas.reshape(-1, 1, 1, 1)
    expected = (1.0 - wide) * torch.from_numpy(x0) + wide * torch.from_numpy(noise)
    np.testing.assert_allclose(noisy, expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(flow.velocity(x0, noise), noise - x0)


def test_the_last_place_is_the_last_level():
    schedule = flow.training_sigmas(SD3)
    assert float(flow.at_density(schedule, jnp.float32([1.0]))[0]) == schedule[-1]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("flow_euler", {"_class_name": "PNDMScheduler"}, "not of flow matching"),
        ("pndm", SD3, "discrete-beta"),
        ("flow_euler", SD3 | {"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        ("flow_euler", SD3 | {"shift_terminal": 0.1}, "shift_terminal=0.1 is not supported"),
        ("flow_euler", SD3 | {"shift": "3"}, "must be of type float"),
        ("flow_euler", DEV, "number of image tokens"),
    ],
)
def test_what_is_not_supported_is_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        schedulers.create(name, config, 8)


def test_steps_run_inside_a_compiled_program():
    ours = schedulers.create("flow_euler", SD3, 4)
    step = jax.jit(lambda tables, x, i: tables.step((), x, i, x)[0])
    x = jnp.ones((1, 2, 2, 1))
    np.testing.assert_allclose(step(ours, x, 3), 1 + ours.stride[3], rtol=1e-6)
