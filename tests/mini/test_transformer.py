"""The shipped transformer: what surrounds it, how a config names it, and that methods change it where they should."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import backbones_mini
from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.methods import esd, uce
from spqr_jax.mini import corpus
from spqr_jax.recipe import transformer
from spqr_jax.run import check, names, opening, protocol


@pytest.fixture(scope="module")
def pipeline():
    return names.backbone(Config(base="mini:transformer"))


def test_it_has_the_recipes_form_and_the_worlds_other_parts(pipeline):
    unet, folder = names.backbone(Config(base="mini")), mini.model_path("transformer")
    assert pipeline.configs["transformer"] == transformer.CONFIG
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == transformer.SCHEDULER
    weights = Path("vae", "diffusion_pytorch_model.safetensors")
    assert storage.sha256(folder / weights) == storage.sha256(mini.model_path() / weights)
    for name in ("text_encoder", "text_encoder_2"):
        own, others = (params_lib.flatten(p.params[part]) for p, part in ((pipeline, name), (unet, "text_encoder")))
        np.testing.assert_array_equal(own.pop("text_projection.kernel"), np.eye(128))
        assert own.keys() == others.keys() and all((leaf == others[path]).all() for path, leaf in own.items())
    assert 4e6 < params_lib.count(pipeline.params["transformer"]) < 6e6


def test_a_config_names_it_and_texts_have_the_length_of_its_training(pipeline):
    states = backbones.condition(pipeline, ["a noto emoji of fox"])
    assert states.context.shape == (1, 33, 256) and states.pooled.shape == (1, 256)
    assert not states.context[0, 32].any()
    assert names.measured(Config(base="mini:transformer"))["mini"]["judge"] == mini.measured()["judge"]
    with pytest.raises(FileNotFoundError, match=r"mini:other is unknown; expected one of mini, mini:transformer\."):
        names.look_at_weights("mini:other")


@pytest.mark.parametrize("which", backbones_mini.BACKBONES)
def test_the_config_opens_on_both_backbones(which):
    config = protocol.resolve(backbones_mini.get_config(which))
    check.check(config)
    loaded = names.backbone(config)
    opening.check_backbone(config, loaded)
    opening.check_sampling(config, loaded)
    assert [subject.name for subject in config.subjects] == list(backbones_mini.SUBJECTS)


def test_methods_change_what_they_are_defined_on(pipeline):
    weapons = mini.concept("weapons")
    edited = uce.align(pipeline, weapons, variant="v2")
    tuned = esd.align(pipeline, weapons, steps=1, batch_size=2, sampling_steps=2)
    leaves = params_lib.flatten(pipeline.params["transformer"])
    changed = [
        {path for path, leaf in params_lib.flatten(p.params["transformer"]).items() if (leaf != leaves[path]).any()}
        for p in (edited, tuned)
    ]
    assert changed[0] == {"context_embedder.kernel", "time_text_embed.text_embedder.linear_1.kernel"}
    assert changed[1] and all(path.startswith("transformer_blocks.") for path in changed[1])


def test_captions_are_numbered():
    where, texts = transformer.captions()
    table = corpus.captions()
    assert texts[0] == "" and len(set(texts)) == len(texts)
    for index in ((0, 0, 0, 0), (94, 2, 7, 6), (50, 1, 3, 4)):
        assert texts[where[index]] == table[index]
