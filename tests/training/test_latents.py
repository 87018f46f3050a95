"""Latents of a data set, encoded in batches that fit."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import convert
from spqr_jax import data
from spqr_jax.training import latents


def test_large_pictures_are_encoded_few_at_a_time_to_the_same_latents(reference, monkeypatch):
    pipeline = convert.load(reference("sd1")[1])
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    dataset = data.from_arrays(images, ["a cat"] * 5)
    whole = latents.encode(pipeline, dataset)
    seen = []
    encode = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda *args: seen.append(len(args[3])) or encode(*args))
    monkeypatch.setattr(latents, "ENCODE_PIXELS", 2 * 16 * 16)
    parts = latents.encode(pipeline, dataset)
    assert seen == [2, 2, 2] and parts.mean.shape == (5, 8, 8, 4)  # the last one padded
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(parts.logvar, whole.logvar, atol=1e-5)
