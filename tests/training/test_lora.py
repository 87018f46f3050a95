"""LoRA adapters: where they start, what they compute, and whether diffusers reads them."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

import convert
from spqr_jax import finetune
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import DoRA, LoRA
from spqr_jax.training import lora

jax.config.update("jax_default_matmul_precision", "highest")
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


def attached(pipeline, **options):
    definition, params = pipeline.definitions["unet"], pipeline.params["unet"]
    return lora.attach(definition, params, **{"rank": RANK, "alpha": ALPHA, "dropout": 0.0} | options)


def trained(params):
    """Adapters as after training: B no longer zero."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path.endswith("magnitude"):
            return leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.standard_normal(leaf.shape).astype(np.float32) * 0.1 if path.endswith("lora_B.kernel") else leaf

    return params_lib.map_with_path(fill, params)


def inputs():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    return latents, np.array([321]), rng.standard_normal((1, 77, 32)).astype(np.float32)


def output(definition, params) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: definition.bind(p)(*inputs()))(params))


def test_starts_equal_to_the_base(pipeline):
    definition, params = attached(pipeline)
    flat = params_lib.flatten(params)
    ups = [leaf for path, leaf in flat.items() if path.endswith("lora_B.kernel")]
    downs = [leaf for path, leaf in flat.items() if path.endswith("lora_A.kernel")]
    assert len(ups) == len(downs) == 4 * 2 * 4  # projections x attentions x transformer blocks of the tiny UNet
    assert all(not np.any(up) for up in ups)
    # Kaiming-uniform with a = sqrt(5), as in PEFT: U(-1/sqrt(in), 1/sqrt(in)).
    for down in downs:
        bound = 1 / np.sqrt(down.shape[0])
        assert np.abs(down).max() <= bound and np.std(down) == pytest.approx(bound / np.sqrt(3), rel=0.25)
    base = output(pipeline.definitions["unet"], pipeline.params["unet"])
    np.testing.assert_array_equal(output(definition, params), base)


@pytest.mark.parametrize(("init", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_starts_from_pefts_distribution(pipeline, reference, init, theirs):
    """The same quantiles of A in the layers of one width together, for which PEFT draws all the same."""
    peft = pytest.importorskip("peft")
    scipy_stats = pytest.importorskip("scipy.stats")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet = copy.deepcopy(reference("sd1")[0].unet)
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=RANK, init_lora_weights=theirs, target_modules=targets))
    params = params_lib.flatten(attached(pipeline, init=init)[1])
    ours = [np.asarray(leaf).T for path, leaf in params.items() if path.endswith("lora_A.kernel")]
    expected = [p.detach().numpy() for name, p in unet.named_parameters() if ".lora_A." in name]
    assert sorted(a.shape for a in ours) == sorted(a.shape for a in expected)
    for width in {a.shape[1] for a in ours}:
        a, b = (np.concatenate([x.ravel() for x in each if x.shape[1] == width]) for each in (ours, expected))
        assert len(a) > 1000 and np.std(a) == pytest.approx(np.std(b), rel=0.05)
        assert scipy_stats.ks_2samp(a, b).pvalue > 1e-3
    assert not any(np.any(leaf) for path, leaf in params.items() if path.endswith("lora_B.kernel"))


def test_refuses_an_unknown_start(pipeline):
    with pytest.raises(ValueError, match="lora_init 'olora' is unknown; expected one of kaiming, gaussian"):
        attached(pipeline, init="olora")


def test_seed_decides_the_adapters(pipeline):
    one, same, other = (params_lib.flatten(attached(pipeline, seed=s)[1]) for s in (1, 1, 2))
    adapters = [path for path in one if path.endswith("lora_A.kernel")]
    assert all(np.array_equal(one[path], same[path]) for path in adapters)
    assert not any(np.array_equal(one[path], other[path]) for path in adapters)
    firsts = {np.asarray(one[path]).tobytes() for path in adapters}
    assert len(firsts) == len(adapters), "two layers start with the same adapter"


@pytest.mark.parametrize("dora", [False, True])
def test_merge_equals_the_adapters_forward(pipeline, dora):
    definition, params = attached(pipeline, dora=dora)
    params = trained(params)
    merged = lora.merge(params, alpha=ALPHA)
    assert params_lib.flatten(merged).keys() == params_lib.flatten(pipeline.params["unet"]).keys()
    with_adapters = output(definition, params)
    error = np.abs(output(pipeline.definitions["unet"], merged) - with_adapters).max()
    moved = np.abs(output(pipeline.definitions["unet"], pipeline.params["unet"]) - with_adapters).max()
    assert moved > 1e-2 and error <= 1e-5 * np.abs(with_adapters).max()


def test_merge_keeps_the_kernels_dtype(pipeline):
    half = params_lib.cast(pipeline.params["unet"], jnp.bfloat16)
    _, params = lora.attach(pipeline.definitions["unet"], half, rank=RANK, alpha=ALPHA, dropout=0.0)
    merged = params_lib.flatten(lora.merge(trained(params), alpha=ALPHA))
    assert {leaf.dtype for leaf in merged.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_the_adapters(pipeline, reference, dora):
    """load_lora_weights and the same UNet output, scaling and magnitudes included."""
    pytest.importorskip("peft")
    definition, params = attached(pipeline, dora=dora)
    params = trained(params)
    pipe = copy.deepcopy(reference("sd1")[0])
    state = lora.peft_state_dict(params, alpha=ALPHA, prefix="unet")
    assert len(state) == 64 + 32 * dora and all(key.startswith("unet.") for key in state)
    pipe.load_lora_weights({key: torch.tensor(value) for key, value in state.items()})
    latents, t, context = inputs()
    with torch.no_grad():
        theirs = pipe.unet(torch.tensor(latents.transpose(0, 3, 1, 2)), int(t[0]), torch.tensor(context)).sample
    ours = output(definition, params).transpose(0, 3, 1, 2)
    assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max()


def test_dropout_keys_differ_by_layer_step_and_place(pipeline):
    _, _, _, keys = finetune.prepare(pipeline, "lite", rank=RANK, alpha=ALPHA, dropout=0.1, seed=0)
    base = jax.random.key(0)
    seen, noise = set(), set()
    for step in range(3):
        key = jax.random.fold_in(base, step)
        flat = params_lib.flatten(lora.fresh_keys(keys, key, 4))
        assert flat.keys() == params_lib.flatten(keys).keys() and len(flat) == 32
        seen |= {np.asarray(one).tobytes() for leaf in flat.values() for one in leaf}
        noise |= {np.asarray(jax.random.key_data(one)).tobytes() for one in jax.random.split(key, 4)}
    assert len(seen) == 3 * 32 * 4
    assert not seen & noise, "a mask would repeat the noise of its step"


def test_dropout_is_inverted_dropout_of_the_adapters_input():
    """Inputs are dropped with probability 0.25 and the kept ones divided by 0.75, before A, as in PEFT."""
    layer = LoRA(64, 64, rank=64, alpha=64.0, dropout=0.25, rngs=nnx.Rngs(0))
    layer.lora_A.kernel[...] = layer.lora_B.kernel[...] = jnp.eye(64)
    layer.key = type(layer.key)(jax.random.key_data(jax.random.split(jax.random.key(0), 200)))
    values = np.asarray(layer(jnp.ones((200, 3, 64))))
    np.testing.assert_allclose(np.unique(values), [0, 1 / 0.75], rtol=1e-6)
    assert (values == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert len({sample.tobytes() for sample in values}) == 200, "two samples have one mask"


def test_no_dropout_no_keys(pipeline):
    assert finetune.prepare(pipeline, "lite", rank=RANK, alpha=ALPHA, dropout=0.0, seed=0)[3] == {}


@pytest.mark.parametrize("rank", [0, 33])
def test_refuses_a_rank_that_does_not_fit(pipeline, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} does not fit down_blocks"):
        lora.attach(pipeline.definitions["unet"], pipeline.params["unet"], rank=rank)


def test_refuses_a_model_without_targets(pipeline):
    with pytest.raises(ValueError, match="no linear layer matches"):
        lora.attach(pipeline.definitions["vae"], pipeline.params["vae"])


def test_dora_starts_equal_to_the_base_but_for_rounding(pipeline):
    base = output(pipeline.definitions["unet"], pipeline.params["unet"])
    np.testing.assert_allclose(output(*attached(pipeline, dora=True)), base, rtol=1e-5, atol=1e-6)


def test_an_output_of_zeros_stays_finite_under_dora():
    """PEFT divides by its norm; alignment methods may leave such outputs."""
    kernel = jnp.ones((8, 4)).at[:, 1].set(0)
    layer = DoRA(kernel, rank=2, alpha=2.0, dropout=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(jnp.ones((1, 8)), kernel), 0, atol=1e-6)
