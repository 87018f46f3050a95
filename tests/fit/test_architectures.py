"""Published backbones known by name: their shapes are those of the files, and nothing is allocated."""

import json
import shutil

import jax
import numpy as np
import pytest

from convert import load
from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.config import Config
from spqr_jax.fit import architectures

# The published sizes of the UNets, and of CLIP's encoders and the autoencoder as diffusers counts them.
COUNTS = {
    "weights/stable-diffusion-v1-5": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "hub:stabilityai/stable-diffusion-2-1": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "weights/stable-diffusion-xl-base-1.0/": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "weights/stable-diffusion-3-medium-diffusers": {
        "transformer": 2_028_328_000 + 192 * 192 * 1536,  # and the table of positions
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "vae": 83_819_683,
    },
    "hub:black-forest-labs/FLUX.1-dev": {
        "transformer": 11_901_408_320,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
}
SIDES = {
    "stable-diffusion-v1-4": 512,
    "stable-diffusion-2-1": 768,
    "stable-diffusion-2-1-base": 512,
    "stable-diffusion-3.5-medium": 1024,
}


@pytest.mark.parametrize("base", COUNTS)
def test_published_sizes(base):
    pipeline = architectures.pipeline(Config(base=base, dtype="bfloat16"))
    assert {name: params_lib.count(tree) for name, tree in pipeline.params.items()} == COUNTS[base]
    leaves = jax.tree.leaves(pipeline.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == "bfloat16" for leaf in leaves)


@pytest.mark.parametrize("name", [*list(SIDES)[:3], pytest.param(list(SIDES)[3], marks=pytest.mark.slow)])
def test_the_size_of_the_images(name):
    pipeline = architectures.pipeline(Config(base=f"elsewhere/{name}"))
    assert backbones.of(pipeline).side(pipeline) == SIDES[name]


def test_mini_and_a_directory_without_weights_have_the_shapes_of_the_weights(tmp_path):
    for part in mini.model_path().rglob("*.json"):
        target = tmp_path / part.relative_to(mini.model_path())
        target.parent.mkdir(exist_ok=True)
        shutil.copy(part, target)
    loaded = load(mini.model_path())
    wanted = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), loaded.params)
    for base in ("mini", str(tmp_path)):
        pipeline = architectures.pipeline(Config(base=base))
        assert jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), pipeline.params) == wanted
        assert pipeline.definitions == loaded.definitions
        assert json.dumps(pipeline.configs["unet"]) == json.dumps(loaded.configs["unet"])


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match=r"config.base=weights/mine is no diffusers directory.*stable-diffusion-v1-5"):
        architectures.pipeline(Config(base="weights/mine"))
