"""What every backbone keeps to, on a small pipeline. A new backbone adds its configs to
`spqr_jax/methods/contract/tiny.py`."""

import functools

import jax
import numpy as np
import pytest

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import BACKBONES, Regions
from tests.contract import small

SIZE = (8, 16)  # height and width in pixels
TEXTS = ["a cat", "", "a dog"]
EVERY = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.key)


@functools.cache
def pipeline(key):
    return small.pipeline(key)


@functools.cache
def condition(key):
    return backbones.condition(pipeline(key), TEXTS, size=SIZE)


def test_keys_and_names_tell_backbones_apart():
    for values in zip(*((b.key, b.name, b.components) for b in BACKBONES), strict=True):
        assert len(set(values)) == len(BACKBONES)


@EVERY
def test_it_is_found_by_its_components(backbone):
    found = pipeline(backbone.key)
    assert backbones.of(found) is backbone and hash(backbone) == hash(backbones.of(found))
    assert {backbone.denoiser, backbone.autoencoder} <= set(backbone.components) == set(found.params)
    assert backbone.weights(found) is found.params[backbone.denoiser]
    weights = dict(backbone.weights(found))
    assert backbone.with_weights(found, weights).params[backbone.denoiser] is weights
    assert backbones.regions(found.params) == backbones.regions(backbone.weights(found)) == backbone.regions


@EVERY
def test_a_condition_has_a_row_a_text(backbone):
    told = condition(backbone.key)
    assert {len(field) for field in jax.tree.leaves(told)} == {len(TEXTS)}
    assert told.context.shape[1] == (2 * small.LENGTH if backbone.key == "sd3" else small.LENGTH)
    swapped = backbones.condition(pipeline(backbone.key), TEXTS[::-1], size=SIZE)
    for field, other in zip(jax.tree.leaves(told), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_array_equal(field, other[::-1])
    for field, row in zip(jax.tree.leaves(told), jax.tree.leaves(told.rows(np.array([2, 0]))), strict=True):
        np.testing.assert_array_equal(row, np.asarray(field)[[2, 0]])


def test_a_condition_of_many_texts_is_the_same_in_blocks_and_in_files(monkeypatch):
    whole = condition("sd3")
    monkeypatch.setattr(backbones.many, "ROWS", 2)
    monkeypatch.setattr(backbones.many, "LARGE", 1)
    found = backbones.condition(pipeline("sd3"), TEXTS, size=SIZE, unconditional=(-2,))
    assert isinstance(found.context, np.memmap)
    for field, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(field, expected, rtol=0, atol=1e-5)
    rows = found.rows(np.array([2, 0]))
    np.testing.assert_array_equal(rows.context, np.asarray(found.context)[[2, 0]])


@EVERY
def test_a_condition_for_another_size_is_that_of_its_texts_there(backbone):
    other = (SIZE[0] * 2, SIZE[1])
    resized = backbone.resized(condition(backbone.key), other)
    for found, expected in zip(
        jax.tree.leaves(resized),
        jax.tree.leaves(backbones.condition(pipeline(backbone.key), TEXTS, size=other)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@EVERY
def test_whole_images_of_the_training_size_change_no_condition(backbone):
    told = condition(backbone.key)
    whole = backbone.cropped(told, np.array([[*SIZE, 0, 0]] * len(TEXTS)))
    for field, expected in zip(jax.tree.leaves(whole), jax.tree.leaves(told), strict=True):
        np.testing.assert_array_equal(field, expected)
        assert field.dtype == expected.dtype
    elsewhere = backbone.cropped(told, np.array([[90, 70, 3, 5]] * len(TEXTS)))
    assert jax.tree.map(np.shape, elsewhere) == jax.tree.map(np.shape, told)
    np.testing.assert_array_equal(elsewhere.context, told.context)


@EVERY
def test_rows_without_a_prompt_differ_in_empty_texts_at_most(backbone):
    """`unconditional` is read for the rows that it numbers, and of these only for those without text."""
    told = condition(backbone.key)
    for rows, may_differ in (((0,), []), ((1,), [1]), ((-2,), [1])):
        given = backbones.condition(pipeline(backbone.key), TEXTS, size=SIZE, unconditional=rows)
        same = [n for n in range(len(TEXTS)) if n not in may_differ]
        for field, other in zip(jax.tree.leaves(told), jax.tree.leaves(given), strict=True):
            np.testing.assert_array_equal(np.asarray(field)[same], np.asarray(other)[same])


@EVERY
def test_a_prediction_has_the_shape_of_its_latents_and_reads_times_and_texts(backbone):
    found, told = pipeline(backbone.key), condition(backbone.key)
    denoiser = backbones.denoiser(found)
    shape = backbone.latent_shape(found, SIZE)
    latents = np.random.default_rng(0).standard_normal((len(TEXTS), *shape)).astype(np.float32)

    @jax.jit
    def predict(times, condition):
        return denoiser.bind(backbone.weights(found))(latents, times, condition)

    times = np.array([1, 500, 999], np.int32)
    predicted = np.asarray(predict(times, told))
    assert predicted.shape == latents.shape and np.isfinite(predicted).all()
    for other in (predict(times[::-1].copy(), told), predict(times, told.rows(np.array([2, 1, 0])))):
        assert not np.array_equal(predicted[0], other[0])


@EVERY
def test_images_become_latents_and_latents_images(backbone):
    found = pipeline(backbone.key)
    codec = found.definitions[backbone.autoencoder].bind(found.params[backbone.autoencoder])
    side = backbone.side(found)
    assert side == small.SIDE * small.FACTOR and backbone.factor(found) == small.FACTOR
    shape = backbone.latent_shape(found, SIZE)
    assert shape[:2] == (SIZE[0] // backbone.factor(found), SIZE[1] // backbone.factor(found))
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    mean, logvar = backbone.encode(codec, images)
    assert mean.shape == logvar.shape == (2, *shape)
    scaling = backbone.scaling(found)
    hash(scaling)
    mean, std = backbone.scaled(np.asarray(mean), np.asarray(logvar), scaling)
    assert mean.shape == std.shape == (2, *shape) and mean.dtype == std.dtype == np.float32 and (std > 0).all()
    pixels = backbone.decode(codec, mean, scaling)
    assert pixels.shape == (2, *SIZE, 3) and pixels.dtype == np.float32


@EVERY
def test_noise_is_drawn_mixed_and_aimed_at(backbone):
    found = pipeline(backbone.key)
    denoiser, schedule = backbones.denoiser(found), backbones.schedule(found)
    mean = np.random.default_rng(0).standard_normal((2, *backbone.latent_shape(found, SIZE))).astype(np.float32)
    drawn, again = (denoiser.draw(jax.random.key(5), mean, np.zeros_like(mean), schedule) for _ in range(2))
    np.testing.assert_array_equal(drawn.latents, mean)
    np.testing.assert_array_equal(drawn.noise, again.noise)
    assert drawn.times.shape == (2,) and denoiser.mix(schedule, drawn).shape == mean.shape
    target = backbone.noising.target(denoiser.prediction, schedule, drawn)
    assert target.shape == mean.shape and np.isfinite(target).all()
    assert backbone.noising.weight(denoiser.prediction, schedule, drawn.times, 5.0).shape == (2,)


@EVERY
@pytest.mark.parametrize("region", Regions._fields)
def test_a_region_has_a_weight_or_is_refused_with_both_names(backbone, region):
    pattern = getattr(backbone.regions, region)
    if pattern is not None:
        assert backbone.require(region, "Mine") is pattern
        _, weights = backbones.define(backbone.denoiser, small.configs(backbone.key)[backbone.denoiser])
        assert any(pattern.search(path) for path in params_lib.flatten(weights)), f"{region} matches no weight"
    without = backbone._replace(regions=backbone.regions._replace(**{region: None}))
    with pytest.raises(ValueError, match=f"Mine needs the region '{region}' .* {backbone.name} does not have; choose"):
        without.require(region, "Mine")
