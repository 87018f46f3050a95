"""Tables against their definition in float64, exactly, and against diffusers' within the rounding of its float32."""

import hashlib
import itertools

import numpy as np
import pytest

from spqr_jax import schedulers
from spqr_jax.schedulers import ddpm
from tests.schedulers import definition
from tests.schedulers.definition import U

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULES = [
    {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr, "num_train_timesteps": count}
    for schedule, zero_snr, count in itertools.product(
        ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), (False, True), (1000, 77)
    )
] + [SD | {"rescale_betas_zero_snr": zero_snr} for zero_snr in (False, True)]
each_schedule = pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: "-".join(map(str, config.values())))


def assert_within_rounding(config, betas, alphas_cumprod, expected):
    """Both tables of `config` are those `expected`, up to what float32 arithmetic may change in either."""
    absolute, relative = definition.rounding(config)
    beta, power = (np.asarray(table, np.float64) for table in expected)
    beyond = np.abs(betas - beta) > absolute
    assert not beyond.any(), f"beta differs at {np.flatnonzero(beyond)}"
    beyond = np.abs(alphas_cumprod - power) > relative * power
    assert not beyond.any(), f"abar differs at {np.flatnonzero(beyond)}"


@each_schedule
def test_tables_are_their_definition_rounded_once(config):
    """From float32 betas before rescaling, every value is the exact one's nearest float32."""
    betas = ddpm.betas(config | {"rescale_betas_zero_snr": False})
    beta, power = definition.tables(betas, config["rescale_betas_zero_snr"])
    np.testing.assert_array_equal(ddpm.betas(config), beta.astype(np.float32))
    np.testing.assert_array_equal(ddpm.alphas_cumprod(config), power.astype(np.float32))
    assert (ddpm.alphas_cumprod(config)[-1] == 0) == config["rescale_betas_zero_snr"]


@each_schedule
def test_tables_follow_the_formula(config):
    formula = definition.tables(definition.betas(config), config["rescale_betas_zero_snr"])
    assert_within_rounding(config, ddpm.betas(config), ddpm.alphas_cumprod(config), formula)


@each_schedule
def test_tables_match_ddpm_scheduler(config):
    reference = pytest.importorskip("diffusers").DDPMScheduler(**config)
    theirs = reference.betas.numpy(), reference.alphas_cumprod.numpy()
    assert_within_rounding(config, ddpm.betas(config), ddpm.alphas_cumprod(config), theirs)


@each_schedule
def test_a_table_shifted_by_one_timestep_is_seen(config):
    """At each timestep a neighbour's value is further away than rounding explains, so a shift of any stretch is."""
    betas, power = ddpm.betas(config), ddpm.alphas_cumprod(config)
    _, relative = definition.rounding(config)
    before, after = (np.append(power[:1], power[:-1]), np.append(power[1:], power[-1:]))
    assert (np.abs(before - power) > relative * power)[1:].all() and (np.abs(after - power) > relative * power)[
        :-1
    ].all()
    for by in (-1, 1):
        with pytest.raises(AssertionError, match="beta differs"):
            assert_within_rounding(config, np.roll(betas, by), power, (betas, power))
        with pytest.raises(AssertionError, match="abar differs"):
            assert_within_rounding(config, betas, np.roll(power, by), (betas, power))


@each_schedule
def test_a_schedule_with_one_timestep_more_or_less_is_seen(config):
    """An off-by-one in the spacing of betas, which reaches the same end."""
    betas, power = ddpm.betas(config), ddpm.alphas_cumprod(config)
    count = len(betas)
    longer = ddpm.betas(config | {"num_train_timesteps": count + 1})
    shorter = ddpm.betas(config | {"num_train_timesteps": count - 1})
    for other in (longer[:-1], longer[1:], np.append(shorter, shorter[-1:]), np.append(shorter[:1], shorter)):
        with pytest.raises(AssertionError, match="beta differs"):
            assert_within_rounding(config, other, power, (betas, power))


def every_table():
    """All tables of configs of every kind, as (name, array)."""
    for config in SCHEDULES:
        name = "-".join(map(str, config.values()))
        yield f"betas {name}", ddpm.betas(config)
        yield f"alphas_cumprod {name}", ddpm.alphas_cumprod(config)
    for name, prediction, spacing, zero_snr, steps in itertools.product(
        ("pndm", "ddim", "euler", "dpmpp"),
        ("epsilon", "v_prediction"),
        ("leading", "linspace", "trailing"),
        (False, True),
        (6, 20, 50),
    ):
        config = SD | {"steps_offset": 1, "prediction_type": prediction, "timestep_spacing": spacing}
        if zero_snr and (name == "pndm" or (prediction == "epsilon" and spacing != "leading")):
            continue  # refused
        for solver in ("midpoint", "heun") if name == "dpmpp" else ("midpoint",):
            options = {"rescale_betas_zero_snr": zero_snr, "solver_type": solver}
            for field, table in schedulers.create(name, config | options, steps)._asdict().items():
                yield f"{name} {prediction} {spacing} {zero_snr} {steps} {solver} {field}", np.asarray(table)


def test_tables_are_the_same_to_the_bit_on_every_machine():
    found = hashlib.sha256()
    for name, table in every_table():
        found.update(name.encode() + table.astype(table.dtype.newbyteorder("<")).tobytes())
    assert found.hexdigest() == "a7f7e6f07c266216edca708862a2dbde7283558620f3f4b1a2de83a34d5204bc"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [6, 20, 50])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_coefficients_are_their_formula(spacing, steps, solver):
    """Exact up to the float32 alpha and sigma that they start from, whose errors the differences of logs magnify."""
    config = SD | {"timestep_spacing": spacing, "solver_type": solver, "steps_offset": 1}
    config |= {"prediction_type": "v_prediction"}
    tables = schedulers.create("dpmpp", config, steps)
    power = ddpm.alphas_cumprod(config).astype(np.float64)[tables.timesteps]
    sigma = np.append(np.sqrt((1 - power) / power), 0)
    alpha = 1 / np.sqrt(1 + sigma**2)
    with np.errstate(divide="ignore"):
        h = np.diff(-np.log(sigma))
    first = -alpha[1:] * np.expm1(-h)
    # log(sigma) of float32 sigma and alpha is wrong by at most 4 U, so that h has 8 U, relative to h.
    np.testing.assert_array_less(np.abs(tables.first - first), 8 * U * (1 + 1 / h) * first)
    slope = first / 2 if solver == "midpoint" else alpha[1:] * (np.expm1(-h) / h + 1)
    second, error = slope[1:-1] * h[1:-1] / h[:-2], 8 * U * (1 + 2 / h[1:-1] + 1 / h[:-2])
    np.testing.assert_array_less(np.abs(tables.second[1:-1] - second), error * second)
    assert tables.second[0] == 0 and tables.second[-1] == 0
