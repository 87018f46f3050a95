"""The loop that trains the world's models: a stop changes neither the weights nor the log of losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import mini
from spqr_jax.recipe import clip, judges, training, transformer, unet, vae

SHIPPED = {
    "clip": clip.RECIPE,
    "vae": vae.RECIPE,
    "harm": judges.RECIPE,
    "features": judges.RECIPE,
    "unet": unet.RECIPE,
    "decoder": vae.DECODER_RECIPE,
    "transformer": transformer.RECIPE,
}
RECIPE = training.Recipe(steps=120, batch=4, lr=0.1, warmup=10, ema=0.9)


def _train(workdir, batch):
    start = {"x": jnp.zeros(3)}
    return training.train("point", start, lambda p, b, key: jnp.square(p["x"] - b).sum(), batch, RECIPE, workdir)


def _draw(rng):
    return np.float32(rng.normal(1.0, 0.1, 3))


def test_a_stopped_training_gives_the_same_weights_and_the_same_log(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 60)
    whole = _train(tmp_path / "whole", _draw)
    drawn = 0

    def stopping(rng):
        nonlocal drawn
        drawn += 1
        if drawn > 110:  # after a checkpoint at 60, and after the losses of 50 and 100 were written
            raise KeyboardInterrupt
        return _draw(rng)

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "stopped", stopping)
    continued = _train(tmp_path / "stopped", _draw)
    np.testing.assert_array_equal(continued["x"], whole["x"])
    logs = [(tmp_path / name / "point" / training.LOG).read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [line.split(",")[0] for line in logs[0].splitlines()] == ["step", "0", "50", "100", "119"]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_was_trained_by_the_recipe_as_it_stands(name):
    """The losses that ship have as many steps as the recipe, and fall."""
    log = np.loadtxt(mini.LOGS / f"{name}.csv", delimiter=",", skiprows=1)
    steps, losses = log.T
    total = SHIPPED[name].steps * SHIPPED[name].cycles
    assert {*range(0, total - 1, training.LOG_EVERY), total - 1} <= set(steps.tolist())
    assert (np.diff(steps) > 0).all() and steps[-1] == total - 1
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:3].mean()


def test_the_losses_of_every_training_ship():
    assert {path.stem for path in mini.LOGS.iterdir()} == set(SHIPPED)


def test_logs_are_kept_beside_what_was_trained(tmp_path):
    _train(tmp_path / "work", _draw)
    training.keep_logs(tmp_path / "work", ["point"], tmp_path / "training")
    assert (tmp_path / "training" / "point.csv").read_text().startswith("step,loss\n0,")
