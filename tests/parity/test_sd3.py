"""SD3 and SD3.5 against diffusers: blocks and whole transformers on random weights, float32; published parameters."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from spqr_jax import backbones
from spqr_jax.backbones.models.sd3 import positions
from tests import flow_reference
from tests.parity import blocks, compared
from tests.parity.test_flow_parts import converted

jax.config.update("jax_default_matmul_precision", "highest")
SD3 = {"_class_name": "SD3Transformer2DModel"}
KINDS = sorted(flow_reference.TRANSFORMERS)


@pytest.fixture(scope="module")
def models():
    """kind -> (diffusers' transformer, a pipeline of ours with its weights)."""
    torch.manual_seed(0)
    made = {kind: flow_reference.sd3_transformer(kind) for kind in KINDS}
    return {kind: (model, converted("transformer", model, SD3 | dict(model.config))) for kind, model in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_transformer(models, kind):
    assert not [row for row in compared.sd3(*models[kind], kind) if not row.error <= row.limit]


def test_transformer_of_latents_that_are_not_square(models):
    rows = compared.sd3(*models["sd35m"], "sd35m", side=(6, 16))
    assert not [row for row in rows if not row.error <= row.limit]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_transformer(models, kind):
    rows = blocks.of_sd3(*models[kind], kind)
    assert not [row for row in rows if not row.error <= row.limit]
    dual = {"SD35AdaLayerNormZeroX"} if kind == "sd35m" else set()
    norms = {"RMSNorm"} if kind != "sd3" else set()
    assert {row.block for row in rows} >= blocks.SD3_BLOCKS | dual | norms


def test_positions_are_those_of_diffusers():
    fresh = diffusers.SD3Transformer2DModel(**flow_reference.SD3).pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(positions(32, 12, 4)[None], fresh, rtol=0, atol=1e-7)


def test_latents_beyond_the_table_of_positions_are_refused(models):
    inputs = compared.sd3_inputs(flow_reference.SD3, side=(8, 28))
    with pytest.raises(ValueError, match=r"8x28 are 4x14 patches; the table of positions has 12x12"):
        compared.our_sd3(compared.bound(models["sd3"][1], "transformer"), inputs)


MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
PUBLISHED = {
    "SD3 medium": (MEDIUM, 2_028_328_000),
    "SD3.5 medium": (
        MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2_243_171_520,
    ),
    "SD3.5 large": (
        MEDIUM | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        8_056_627_520,
    ),
}
LARGE = ("SD3.5 medium", "SD3.5 large")


@pytest.mark.parametrize("name", ["SD3 medium", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_parameters_of_the_published_transformers(name):
    """By name, shape and count, with nothing allocated. The table of positions is no parameter."""
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = compared.torch_shapes(backbones.define("transformer", SD3 | dict(model.config))[1])
    assert found == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(np.prod(shape) for shape in found.values()) == count + np.prod(found["pos_embed.pos_embed"])
