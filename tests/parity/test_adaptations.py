"""DreamBooth and textual inversion against the training steps of diffusers' examples, on PyTorch.

The loops are those of examples/dreambooth/train_dreambooth.py (--with_prior_preservation) and
examples/textual_inversion/textual_inversion.py. DoRA and LoRA with the text encoder are in test_finetune.py.
"""

import copy

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import convert
from spqr_jax import backbones, data, finetune
from spqr_jax import params as params_lib
from spqr_jax.params import flatten as flat
from spqr_jax.training import prior, words
from spqr_jax.training.prior import Prior
from tests.parity import test_finetune as parity

jax.config.update("jax_default_matmul_precision", "highest")
STEPS, SEED, WEIGHT, WORD = 10, 42, 0.7, "<new>"


def pictures(count: int, seed: int = 0) -> data.Dataset:
    images = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return data.from_arrays(images, ["replaced"] * count, "pictures")


def prior_loss(output, target):
    """train_dreambooth.py: both chunked in two, the second half times --prior_loss_weight."""
    (own, of_class), (own_target, class_target) = torch.chunk(output, 2), torch.chunk(target, 2)
    mse = torch.nn.functional.mse_loss
    return mse(own, own_target) + WEIGHT * mse(of_class, class_target)


def all_of_the_unet(pipeline, pipe, profile, adapters) -> list:
    return parity.torch_trainable(pipeline, pipe, "standard", adapters)


def test_dreambooth(reference):
    """Three pictures and five class pictures in batches of 2 + 2."""
    pipe, directory = reference("sd1")
    pipeline, own = convert.load(directory), Prior(3, 5, WEIGHT)
    class_images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
    dataset = prior.joined(pictures(3), "a photo of a cat", class_images, "the dog")
    order = [batch.rows for batch in prior.batches(own, 4, STEPS, SEED)]
    o = finetune.Optimiser(lr=2e-3, warmup_steps=4, max_grad_norm=2.0)
    trained, losses, norms, _ = parity.torch_run(
        *(pipe, pipeline, dataset, o, "dreambooth", "epsilon", order, {}), loss_of=prior_loss, trainable=all_of_the_unet
    )
    tuned, progress = parity.our_run(pipeline, dataset, "dreambooth", optimiser=o, batch_size=4, prior=own)
    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    parity.check_frozen(pipeline, tuned, "dreambooth", False)
    parity.check_updates("unet", pipeline, tuned, trained.unet)


def one_new_word(pipeline, pipe, profile, adapters) -> list:
    """textual_inversion.py: a resized table whose last row starts as that of the initial word; all else frozen."""
    del pipeline, profile, adapters
    assert pipe.tokenizer.add_tokens(WORD) == 1
    (start,) = pipe.tokenizer.encode("cat", add_special_tokens=False)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    table = pipe.text_encoder.get_input_embeddings().weight
    table.data[-1] = table.data[start].clone()
    table.requires_grad_(True)
    pipe.before = table.detach().clone()
    return [table]


def others_stay(pipe) -> None:
    """textual_inversion.py, after each step: "make sure we don't update any embedding weights besides the new"."""
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[:-1] = pipe.before[:-1]


def test_textual_inversion(reference):
    pipe, directory = reference("sd1")
    pipeline = convert.load(directory)
    dataset = words.captioned(pictures(2), WORD)
    order = list(data.sample_order([len(dataset)], 2, STEPS, SEED))
    o = finetune.Optimiser(lr=2e-2, warmup_steps=4, max_grad_norm=1e9)  # the script does not clip
    trained, losses, _, _ = parity.torch_run(
        *(pipe, pipeline, dataset, o, "textual_inversion", "epsilon", order, {}),
        trainable=one_new_word,
        after_step=others_stay,
    )
    options = {"optimiser": o, "word": WORD, "initial": "cat"}
    tuned, progress = parity.our_run(pipeline, dataset, "textual_inversion", **options)
    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    before, after = (flat(p.params["text_encoder"]) for p in (pipeline, tuned))
    table = f"{words.TABLE}.embedding"
    theirs = trained.text_encoder.get_input_embeddings().weight[-1].detach().numpy()
    (start,) = pipeline.tokenizers["tokenizer"]("cat", add_special_tokens=False).input_ids
    moved = np.abs(theirs - before[table][start]).max()
    assert moved > 1e-2 and np.abs(after[table][-1] - theirs).max() <= 1e-4 * moved
    assert np.array_equal(after[table][:-1], before[table])
    assert all(np.array_equal(after[path], before[path]) for path in before if path != table)
    assert all(tuned.params[name] is pipeline.params[name] for name in ("unet", "vae"))
    check_that_diffusers_reads_it(pipe, pipeline, tuned)


def check_that_diffusers_reads_it(pipe, pipeline, tuned) -> None:
    """The file of the new word gives in diffusers the text states that it gives here."""
    adapted = finetune.Adapted("textual_inversion", new_row(tuned), 0.0, WORD)
    state = {name: torch.tensor(np.asarray(leaf)) for name, leaf in finetune.adapter_file(pipeline, adapted).items()}
    assert list(state) == [WORD]
    pipe = copy.deepcopy(pipe)
    pipe.load_textual_inversion(state)
    theirs = parity.torch_conditions(pipe, ["the cat and <new>"])["encoder_hidden_states"].detach().numpy()
    ours = backbones.condition(tuned, ["the cat and <new>"]).context
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def new_row(tuned) -> params_lib.Params:
    table = flat(tuned.params["text_encoder"])[f"{words.TABLE}.embedding"]
    return {"text_encoder": params_lib.unflatten({f"{words.TABLE}.new": table[-1:]})}
