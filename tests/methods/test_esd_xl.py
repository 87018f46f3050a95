"""ESD on SDXL: the loss with pooled states and sizes against PyTorch, and what it trains."""

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones.sdxl import SDXL
from spqr_jax.methods import Concept, esd
from spqr_jax.methods.tools import loop, negative_guidance
from spqr_jax.methods.tools.loop import Adam

FLAT = params_lib.flatten
CONCEPT = Concept("cat", ("cat", "nude"))
NAME = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sdxl")[1])


def test_texts_are_told_as_in_sampling(pipeline, reference):
    """Both encoders' penultimate states, the second's projection and the sizes; no text is the pipeline's own."""
    pipe = reference("sdxl")[0]
    texts = negative_guidance.encode(pipeline, ("cat",))
    with torch.no_grad():
        states, negative, pooled, negative_pooled = pipe.encode_prompt("cat", device="cpu", negative_prompt="")
    np.testing.assert_allclose(texts.context, torch.cat([states, negative]), atol=1e-5)
    np.testing.assert_allclose(texts.pooled, torch.cat([pooled, negative_pooled]), atol=1e-5)
    assert texts.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    index = {"model_index": {"force_zeros_for_empty_prompt": True}}
    forced = negative_guidance.encode(pipeline._replace(configs=pipeline.configs | index), ("cat",))
    assert not forced.context[-1].any() and not forced.pooled[-1].any() and forced.context[0].any()


@pytest.mark.slow
def test_loss_and_gradient_equal_pytorch(pipeline, reference):
    unet = loop.on_device(pipeline.params["unet"])
    train, _ = params_lib.partition(unet, esd.trained(SDXL, unet, "esd-x"))
    rng = np.random.default_rng(0)
    latents, t = rng.standard_normal((1, 8, 8, 4)).astype(np.float32), np.array([431], np.int32)
    told = negative_guidance.encode(pipeline, ("cat", "nude"))
    positive, empty = told.rows(np.array([1])), told.rows(np.array([-1]))
    adam = Adam(1e-5)
    static = negative_guidance.Static(backbones.denoiser(pipeline), params_lib.merge)
    update = loop.compiled(negative_guidance.GRADIENT, static, adam)
    inputs = (unet, latents, t, positive, empty, np.float32(0.5))
    _, state, (value, _) = update(train, loop.transform(adam).init(train), None, *inputs)
    # Adam's first moment after one step is a tenth of the gradient.
    gradient = jax.tree.map(lambda m: 10 * np.asarray(m), optax.tree_utils.tree_get(state, "mu"))

    model = reference("sdxl")[0].unet

    def predict(texts):
        added = {"text_embeds": torch.tensor(texts.pooled), "time_ids": torch.tensor(texts.time_ids)}
        sample = torch.tensor(latents.transpose(0, 3, 1, 2))
        return model(sample, torch.tensor(t), torch.tensor(texts.context), added_cond_kwargs=added).sample

    with torch.no_grad():
        with_text, without = predict(positive), predict(empty)
    model.zero_grad()
    loss = torch.nn.functional.mse_loss(predict(positive), without - 0.5 * (with_text - without))
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)
    expected = model.get_submodule(NAME).weight.grad.numpy().T
    assert np.abs(FLAT(gradient)[f"{NAME}.kernel"] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_it_trains_exactly_cross_attention(pipeline):
    aligned = esd.align(pipeline, CONCEPT, method="esd-x", steps=1, sampling_steps=2)
    before, after = FLAT(pipeline.params["unet"]), FLAT(aligned.params["unet"])
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed == {path for path in before if ".attn2." in path}
    assert {"add_embedding.linear_1.kernel", "time_embedding.linear_1.kernel"}.isdisjoint(
        path for path, flag in FLAT(esd.trained(SDXL, pipeline.params["unet"], "esd-u")).items() if flag
    )
