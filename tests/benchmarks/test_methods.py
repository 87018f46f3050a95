"""What the benchmark of alignment methods counts, and how it turns counts into time."""

from types import SimpleNamespace

import pytest

from benchmarks import methods, rehearsal


@pytest.mark.slow
def test_methods_are_counted_at_their_defaults():
    """Against the authors' settings and what a step does: a pass with gradient costs about three without."""
    erasediff = rehearsal.rehearse("erasediff")
    assert (erasediff.pictures, erasediff.encoded, erasediff.steps) == pytest.approx((800, 800, 160))
    assert erasediff.sampling == 800 * 100 * 2  # with guidance
    # Forget loss: one pass without gradient and one with; retain loss: one with.
    assert erasediff.training == pytest.approx(160 * 16 * (1 + 3 + 3), rel=0.15)
    esd = rehearsal.rehearse("esd")
    assert (esd.pictures, esd.steps) == pytest.approx((0, 1000))
    assert esd.sampling == pytest.approx(1000 * 2 * 24.5, rel=0.25)  # down to a random one of 50 steps
    assert esd.training == pytest.approx(1000 * (2 + 3), rel=0.15)
    assert rehearsal.trained_step() == pytest.approx(3, rel=0.15)


@pytest.mark.slow
def test_an_attack_within_every_step_is_counted():
    counts = rehearsal.rehearse("advunlearn", steps=10, warmup=4, attack_steps=3, walks=1)
    assert (counts.steps, counts.pictures) == pytest.approx((10 + 6 * 3, 0))


def test_counts_become_seconds():
    counts = rehearsal.Counts(pictures=10, encoded=10, sampling=1000, steps=7, training=600)
    flags = SimpleNamespace(evaluation_seconds=0.0, step_seconds=0.0, tflops=100.0)
    vae = 10 * (2.5 + 1.1) / 100
    assert methods.seconds(counts, methods.cost(flags, 3.0)) == pytest.approx(1600 * 0.008 + vae)
    flags.evaluation_seconds, flags.step_seconds = 0.016, 0.06
    assert methods.seconds(counts, methods.cost(flags, 3.0)) == pytest.approx(1000 * 0.016 + 600 * 0.02 + 2 * vae)


def test_settings_are_the_tables_and_every_method_of_the_emoji_world_has_some():
    from spqr_jax.methods import METHODS

    on_the_emoji_world = {name for name, method in METHODS.items() if "sd" in (method.backbones or ["sd"])}
    assert set(methods.settings()) == on_the_emoji_world
    prepared = methods.on_the_emoji_world("uce", methods.settings()["uce"])
    assert prepared.tasks["align"]()["compiling"] >= 0 and prepared.seconds["loading"] > 0
