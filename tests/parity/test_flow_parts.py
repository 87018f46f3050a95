"""What SD3 and FLUX share, against transformers and diffusers: T5, the VAE of 16 channels, noising. Random weights."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers.training_utils import compute_density_for_timestep_sampling

from convert import rename
from spqr_jax import backbones
from spqr_jax.backbones.models import t5 as ours_t5
from spqr_jax.backbones.noising import FLUX_FLOW, SD3_FLOW
from spqr_jax.pipeline import Pipeline
from tests import flow_reference
from tests.parity import blocks, compared

jax.config.update("jax_default_matmul_precision", "highest")
T5_BLOCKS = {"T5LayerNorm", "T5Attention", "T5LayerSelfAttention", "T5DenseGatedActDense", "T5LayerFF", "Embedding"}


def converted(component: str, model: torch.nn.Module, config: dict) -> Pipeline:
    """A pipeline of one component, with the weights of `model`."""
    definition, shapes = backbones.define(component, config)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
    params = rename.from_torch(state, shapes, component=component, source="a random model")
    return Pipeline({component: params}, {component: definition}, {component: config}, {})


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    model = flow_reference.t5(40)
    return model, converted("text_encoder_3", model, model.config.to_dict() | {"architectures": ["T5EncoderModel"]})


def test_t5(t5):
    assert not [row for row in compared.t5(*t5, "text_encoder_3", "t5") if not row.error <= row.limit]


def test_blocks_of_t5(t5):
    rows = blocks.of_t5(*t5, "text_encoder_3", "t5")
    assert not [row for row in rows if not row.error <= row.limit]
    assert {row.block for row in rows} >= T5_BLOCKS


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 20), (32, 64)])
def test_rows_of_relative_positions(count, furthest):
    """At every distance that a published length has: rounding decides where a row begins."""
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(520)
    theirs = T5Attention._relative_position_bucket(position[None] - position[:, None], True, count, furthest)
    np.testing.assert_array_equal(ours_t5.buckets(520, count, furthest), theirs.numpy())


def test_the_first_t5_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj='relu' is not supported"):
        backbones.define("text_encoder_3", flow_reference.T5 | {"feed_forward_proj": "relu"})


def test_parameters_of_t5_xxl():
    """By name, shape and count, with nothing allocated."""
    from transformers import T5Config, T5EncoderModel

    config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    config |= {"feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes.pop("encoder.embed_tokens.weight") == shapes["shared.weight"]
    assert compared.torch_shapes(backbones.define("text_encoder_3", config)[1]) == shapes
    assert sum(np.prod(shape) for shape in shapes.values()) == 4_762_310_656


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = flow_reference.vae()
    return model, converted("vae", model, dict(model.config))


def test_vae_of_16_channels(vae):
    class Pipe:
        vae = None

    Pipe.vae, pipeline = vae
    rows = compared.vae(Pipe, pipeline, "16 channels") + blocks.of_vae(Pipe, pipeline, "16 channels")
    assert not [row for row in rows if not row.error <= row.limit]
    assert {row.block for row in rows} >= blocks.VAE_BLOCKS


def test_parameters_of_the_published_vae():
    import diffusers

    config = flow_reference.VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config |= {"norm_num_groups": 32}
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert compared.torch_shapes(backbones.define("vae", config)[1]) == shapes
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_819_683


@pytest.mark.parametrize(("noising", "kind"), [(SD3_FLOW, "logit_normal"), (FLUX_FLOW, "none")])
def test_a_training_step_draws_times_and_mixes_as_the_scripts_do(noising, kind):
    """train_dreambooth_sd3.py and train_dreambooth_flux.py for the places u that we draw, and u's distribution."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {"shift": 3.0, "num_train_timesteps": 1000}
    scheduler, schedule = FlowMatchEulerDiscreteScheduler(**config), noising.schedule(config)
    mean = np.random.default_rng(0).standard_normal((4096, 2, 2, 3)).astype(np.float32)
    drawn = noising.draw(jax.random.key(1), mean, np.zeros_like(mean), schedule)
    times = torch.tensor(np.asarray(drawn.times))
    indices = [int((scheduler.timesteps == t).nonzero()) for t in times]  # a time that the script never draws fails
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(kind, 4096, logit_mean=0.0, logit_std=1.0, generator=generator)
    theirs = np.quantile((u * 1000).long().numpy(), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(np.quantile(indices, [0.1, 0.5, 0.9]), theirs, atol=25)

    sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
    latents, noise = (torch.tensor(np.asarray(x)) for x in (drawn.latents, drawn.noise))
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    np.testing.assert_allclose(noising.mix(schedule, *drawn), noisy.numpy(), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(noising.target("flow", schedule, drawn), (noise - latents).numpy())


def test_min_snr_is_that_of_the_error_of_x0():
    """The weight times the velocity's squared error is min(SNR, gamma) times that of x_0 (Hang et al. 2023, eq. 5)."""
    schedule = SD3_FLOW.schedule({"shift": 3.0})
    sigma = np.asarray(schedule, np.float64)[[50, 300, 990]]
    snr = ((1 - sigma) / sigma) ** 2
    found = SD3_FLOW.weight("flow", schedule, schedule[np.array([50, 300, 990])] * 1000, 5.0)
    np.testing.assert_allclose(found, np.minimum(snr, 5.0) * sigma**2, rtol=1e-5)
