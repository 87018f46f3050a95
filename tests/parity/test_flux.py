"""FLUX's transformer against diffusers on PyTorch, same random weights, float32."""

import jax
import pytest

torch = pytest.importorskip("torch")

from flax import nnx

from convert import rename
from spqr_jax import params as params_lib
from spqr_jax.backbones.models import FluxTransformer2DModel
from tests import flux_reference as flux
from tests.parity import blocks
from tests.parity.test_models import check

jax.config.update("jax_default_matmul_precision", "highest")
KINDS = list(flux.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind):
    rows = flux.of_blocks(kind)
    check(rows)
    guided = "Guidance" if kind == "dev" else ""
    assert {row.block for row in rows} == blocks.FLUX_BLOCKS | {f"CombinedTimestep{guided}TextProjEmbeddings"}


@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind):
    check([flux.whole(kind)])


# The parameters of black-forest-labs/FLUX.1-dev and FLUX.1-schnell.
COUNTS = {"dev": 11_901_408_320, "schnell": 11_891_178_560}


def test_the_full_models_have_the_leaves_of_diffusers():
    """Names, shapes and number, on the meta device: nothing is allocated. diffusers' defaults are FLUX.1's config."""
    import diffusers

    _, shapes = params_lib.skeleton(lambda: FluxTransformer2DModel(flux.KINDS["dev"], rngs=nnx.Rngs(0)))
    leaves = params_lib.flatten(shapes)
    ours = {rename.torch_name(p): x.shape[::-1] if p.endswith(".kernel") else x.shape for p, x in leaves.items()}
    assert params_lib.count(shapes) == COUNTS["dev"]
    for kind in KINDS:
        with torch.device("meta"):
            model = diffusers.FluxTransformer2DModel(**flux.KINDS[kind])
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # schnell is dev without the embedding of guidance.
        assert found == {name: ours[name] for name in ours if kind == "dev" or ".guidance_embedder." not in name}
        assert sum(tensor.numel() for tensor in model.parameters()) == COUNTS[kind]


@pytest.mark.parametrize(
    ("field", "value"),
    [("patch_size", 2), ("out_channels", 8), ("axes_dims_rope", (16, 16, 16))],
)
def test_a_config_that_is_not_supported_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        params_lib.skeleton(lambda: FluxTransformer2DModel({field: value}, rngs=nnx.Rngs(0)))
