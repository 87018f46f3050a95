"""Ids of aligned weights: they change with whatever determines the weights, and with nothing else."""

import shutil

import numpy as np
import pytest
from PIL import Image

from spqr_jax.config import Config, Subject
from spqr_jax.methods import METHODS, uce
from spqr_jax.run import identity
from spqr_jax.run.identity import Inputs


def weights(method="esd", options=None, name="Mine", **fields):
    config = Config(subjects=(Subject(name, method, options or {}),), **fields)
    sources = identity.data_sources(config.subjects)
    return identity.weights_id(config, config.subjects[0], Inputs("backbone", {}, {}, {}, sources))


def test_a_default_that_is_named_changes_nothing():
    every = {"steps": 1000, "lr": 1e-5, "eta": 1, "batch_size": 1.0, "seed": 0, "progress": False}  # 1 is 1.0
    assert weights(options=every) == weights(name="Yours") == weights()
    assert len({weights(options={"steps": 999}), weights(options={"seed": 1}), weights(seed=1), weights()}) == 4
    assert weights("uce", {"variant": "v1"}) == weights("uce") != weights("uce", {"variant": "v2"})


def test_a_changed_default_changes_the_id(monkeypatch):
    def align(pipeline, concept, *, seed=0, ridge=0.6, progress=False):
        return uce.align(pipeline, concept, ridge=ridge)

    before = weights("none")
    monkeypatch.setitem(METHODS, "none", METHODS["none"]._replace(align=align))
    assert weights("none") != before
    assert weights("none", {"ridge": 0.6}) == weights("none")


def images(folder, seed=0):
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    return f"folder:{folder}"


@pytest.mark.parametrize(
    ("method", "option"),
    [(name, option) for name, method in METHODS.items() for option in method.data_options],
)
def test_images_of_ones_own_are_known_by_their_content(tmp_path, method, option):
    place = images(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    first = weights(method, {option: place})
    assert weights(method, {option: f"folder:{tmp_path / 'copy'}"}) == first
    assert weights(method, {option: images(tmp_path / "b", seed=1)}) != first
    assert weights(method, {option: ""}) == weights(method) != first
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n0.png,a dog\n")
    assert weights(method, {option: place}) != first


def test_a_data_source_is_named_with_its_subject_when_it_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Mine: pictures: .*nowhere"):
        weights("salun", {"pictures": f"folder:{tmp_path}/nowhere"})
