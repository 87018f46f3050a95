"""Schedulers against diffusers' classes on PyTorch: whole 20-step samples driven by the same fixed model."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import schedulers
from spqr_jax.schedulers import ddpm
from spqr_jax.schedulers.common import read_config
from tests.schedulers import definition

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CLASSES = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15 = SD | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = SD | {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
NO_CLIP = {"clip_sample": False}


def reference_sample(name, config, steps, latents):
    """diffusers' timesteps, final latents and per-step latents [E, ...] from `latents` (unit noise)."""
    scheduler = CLASSES[name].from_config(dict(config))
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(latents) * scheduler.init_noise_sigma
    path = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = torch.tanh(0.3 * seen + float(t) / 1000)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        path.append(x.numpy())
    return scheduler, np.stack(path)


@partial(jax.jit, static_argnames="dtype")
def scan_sample(scheduler, latents, dtype):
    """Per-step latents [E, ...]; the tables are arguments, so that configs of one scheduler share a compilation."""

    def body(carry, i):
        x, state = carry
        t = jnp.asarray(scheduler.timesteps)[i].astype(jnp.float32)
        output = jnp.tanh(0.3 * scheduler.scale_input(x, i) + t / 1000).astype(dtype)
        x, state = scheduler.step(state, output, i, x)
        return (x, state), x

    start = latents * scheduler.init_noise_sigma
    carry = start, scheduler.init_state(start)
    return jax.lax.scan(body, carry, jnp.arange(len(scheduler.timesteps)))[1]


def our_sample(name, config, steps, latents, dtype=jnp.float32):
    scheduler = schedulers.create(name, config, steps)
    return scheduler, np.asarray(scan_sample(scheduler, latents, dtype))


def assert_same_sample(name, config, steps=20, tolerance=1e-5):
    latents = np.random.default_rng(0).standard_normal((2, 4, 5, 3), dtype=np.float32)
    reference, expected = reference_sample(name, config, steps, latents)
    ours, found = our_sample(name, config, steps, latents)
    np.testing.assert_array_equal(ours.timesteps, reference.timesteps.numpy())
    # 1 / sqrt(abar), or sqrt(1 / abar - 1): for either, half of abar's relative error, and a few roundings.
    limit = table_error(config, [math.ceil(ours.timesteps[0])])[0] / 2 + 4 * definition.U
    assert ours.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=limit)
    check_paths(name, found, expected, tolerance)


def table_error(config, t):
    """How far abar at timesteps t may be from the reference's, relative, of a config that names no betas."""
    filled = dict(vars(read_config("ddpm", config)))
    return definition.rounding(filled)[1][t]


def check_paths(name, found, expected, tolerance=1e-5):
    assert np.isfinite(expected).all()
    # Every step, not only the last: a late clip or a zero final sigma could hide an early mistake.
    for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
        assert error <= tolerance, f"{name} evaluation {k}: relative error {error:.2e}"


GRID = [
    (name, prediction, spacing)
    for name, prediction, spacing in itertools.product(
        CLASSES, ("epsilon", "v_prediction", "sample"), ("leading", "linspace", "trailing")
    )
    if (name, prediction) != ("pndm", "sample")  # diffusers' PNDM has no sample prediction
]


@pytest.mark.parametrize(("name", "prediction", "spacing"), GRID)
def test_matches_diffusers(name, prediction, spacing):
    assert_same_sample(name, SD15 | {"prediction_type": prediction, "timestep_spacing": spacing})


@pytest.mark.parametrize(
    ("name", "prediction", "spacing"),
    itertools.product(("ddim", "euler", "dpmpp"), ("v_prediction", "sample"), ("leading", "linspace", "trailing")),
)
def test_matches_diffusers_at_zero_snr(name, prediction, spacing):
    config = SD21 | {"rescale_betas_zero_snr": True, "prediction_type": prediction, "timestep_spacing": spacing}
    tolerance = 1e-5
    if name == "euler":  # its first step subtracts latents of size sigma and leaves those of size sigma_next
        sigma = schedulers.create(name, config, 20).sigma
        tolerance += 4 * definition.U * sigma[0] / sigma[1]
    assert_same_sample(name, config, tolerance=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize(
    ("name", "config"),
    [("pndm", SD15), ("ddim", SD15), ("dpmpp", SD15), ("ddim", SD21), ("pndm", SD21), ("euler", SDXL)],
)
def test_named_configs(name, config, steps):
    assert_same_sample(name, config, steps)


@pytest.mark.parametrize("name", CLASSES)
def test_absent_fields_take_the_defaults_of_the_class(name):
    assert_same_sample(name, {})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pndm", {"skip_prk_steps": False}),
        ("pndm", {"skip_prk_steps": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("pndm", {"set_alpha_to_one": True}),
        ("ddim", {"set_alpha_to_one": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.7}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp", {"solver_order": 1}),
        ("dpmpp", {"solver_type": "heun"}),
        ("dpmpp", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("dpmpp", {"lower_order_final": False}),
        ("euler", {"rescale_betas_zero_snr": True, "timestep_spacing": "leading", "prediction_type": "epsilon"}),
    ],
)
@pytest.mark.parametrize("steps", [9, 20])
def test_options(name, change, steps):
    assert_same_sample(name, SD15 | change, steps)


@pytest.mark.parametrize(
    ("name", "zero_snr"), [(name, False) for name in CLASSES] + [(name, True) for name in CLASSES if name != "pndm"]
)
def test_an_error_of_one_timestep_is_seen(name, zero_snr):
    """Tables for one timestep lower or higher, or for a spacing of one more or less, fail the comparison of samples."""
    config = SD21 | {"rescale_betas_zero_snr": zero_snr, "timestep_spacing": "leading"}
    latents = np.random.default_rng(0).standard_normal((2, 4, 5, 3), dtype=np.float32)
    reference, expected = reference_sample(name, config, 20, latents)
    for wrong, steps in (({"steps_offset": 0}, 20), ({"steps_offset": 2}, 20), ({}, 19), ({}, 21)):
        tables = schedulers.create(name, config | wrong, steps)
        count = min(len(tables.timesteps), len(expected))
        # The model gets the right timesteps, so that only the tables are wrong.
        right = np.append(reference.timesteps.numpy(), 0)[: len(tables.timesteps)]
        found = np.asarray(scan_sample(tables._replace(timesteps=right), latents, jnp.float32))
        with pytest.raises(AssertionError, match="relative error"):
            check_paths(name, found[:count], expected[:count])


def test_pndm_evaluates_the_second_timestep_twice():
    timesteps = schedulers.create("pndm", SD15, 50).timesteps
    assert timesteps.dtype == np.int32
    assert timesteps.tolist()[:4] == [981, 961, 961, 941] and len(timesteps) == 51


def test_computes_in_float32_for_a_bfloat16_model():
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4), dtype=np.float32)
    for name in CLASSES:
        _, path = our_sample(name, SD15, 5, latents, dtype=jnp.bfloat16)
        assert path.dtype == np.float32 and np.isfinite(path).all()


def test_tables_are_float32_and_may_be_closed_over():
    for name in CLASSES:
        scheduler = schedulers.create(name, SD15 | {"timestep_spacing": "leading"}, 8)
        for field, table in scheduler._asdict().items():
            if field in ("timesteps", "init_noise_sigma", "clip", "remember", "restart"):
                continue
            assert table.dtype == np.float32 and len(table) == len(scheduler.timesteps), field
        x = jnp.ones((1, 2, 2, 4))
        step = jax.jit(lambda x, i, s=scheduler: s.step(s.init_state(x), 0.1 * x, i, x)[0])
        np.testing.assert_allclose(step(x, 2), scheduler.step(scheduler.init_state(x), 0.1 * x, 2, x)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("heun", {}, "heun"),
        ("ddim", {"beta_schedule": "cosine"}, "beta_schedule='cosine'"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type"),
        ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("euler", {"timestep_spacing": "karras"}, "timestep_spacing"),
        ("euler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("dpmpp", {"solver_order": 3}, "solver_order=3"),
        ("dpmpp", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpmpp", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddim", {"beta_start": "0.1"}, "beta_start"),
        ("ddim", {"clip_sample": 1}, "clip_sample"),
        ("ddim", {"steps_offset": True}, "steps_offset"),
        ("ddim", {"beta_end": 1.5}, "beta_end"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("euler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
    ],
)
def test_refuses_what_it_cannot_honour(name, config, message):
    with pytest.raises(ValueError, match=message):
        schedulers.create(name, config, 20)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
@pytest.mark.parametrize("name", CLASSES)
def test_refuses_step_counts(name, steps):
    with pytest.raises(ValueError, match="num_steps"):
        schedulers.create(name, SD15, steps)


def test_refuses_epsilon_at_zero_snr_and_timesteps_beyond_the_schedule():
    config = SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        schedulers.create("ddim", config, 20)
    with pytest.raises(ValueError, match="timestep 1000 is outside"):
        schedulers.create("ddim", SD15, 1000)
    # diffusers lays out a 62nd timestep, -1, and evaluates the model there.
    with pytest.raises(ValueError, match="timestep -1 is outside"):
        schedulers.create("ddim", SD15 | {"timestep_spacing": "trailing"}, 61)


def test_trained_betas():
    betas = np.linspace(0.001, 0.01, 10).tolist()
    config = {"trained_betas": betas, "num_train_timesteps": 10}
    expected = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(ddpm.alphas_cumprod(config), expected)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_forward_process_is_that_of_ddpm_scheduler(zero_snr):
    config = SD | {"rescale_betas_zero_snr": zero_snr}
    reference = diffusers.DDPMScheduler(**config)
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, 6, 8, 8, 4), dtype=np.float32)
    t = np.array([0, 1, 500, 981, 998, 999])
    table = ddpm.alphas_cumprod(config)
    args = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
    # alpha = sqrt(abar) takes half of abar's relative error, sigma = sqrt(1 - abar) as much in absolute terms, times
    # abar / sigma; latents of at most 5.
    power = table[t].astype(np.float64)
    error = table_error(config, t) / 2 * (np.sqrt(power) + power / np.sqrt(1 - power))
    limit = (5e-7 + 5 * error)[:, None, None, None]
    for ours, theirs in (
        (ddpm.add_noise(table, x0, noise, t), reference.add_noise(*args)),
        (ddpm.velocity(table, x0, noise, t), reference.get_velocity(*args)),
    ):
        assert (np.abs(ours - theirs.numpy()) <= limit).all()
    late = ddpm.add_noise(table, x0, noise, np.maximum(t - 1, 0)) - reference.add_noise(*args).numpy()
    assert all(np.abs(late[k]).max() > limit[k] for k in range(1, len(t))), "an error of one timestep would pass"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_pred_x0_inverts_target(prediction):
    rng = np.random.default_rng(2)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 4), dtype=np.float32)
    table, t = ddpm.alphas_cumprod(SD), np.array([3, 400, 990])
    x_t = ddpm.add_noise(table, x0, noise, t)
    output = ddpm.target(prediction, table, x0=x0, noise=noise, t=t)
    found = ddpm.pred_x0(prediction, table, x_t=x_t, model_output=output, t=t)
    np.testing.assert_allclose(found, x0, atol=2e-5)
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        ddpm.target("flow", table, x0=x0, noise=noise, t=t)


def test_snr_against_float64():
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2
    power = np.cumprod(1 - betas)
    t = np.array([0, 10, 999])
    np.testing.assert_allclose(ddpm.snr(ddpm.alphas_cumprod(SD), t), (power / (1 - power))[t], rtol=2e-4)
