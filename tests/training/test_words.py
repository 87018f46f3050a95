"""Pseudo words, against diffusers' `load_textual_inversion`."""

import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax.generate import generate
from spqr_jax.methods.tools.word_vectors import word_table, word_vector
from spqr_jax.training import words

torch = pytest.importorskip("torch")
from tests import conftest

WORDS = ("<word-0>", "<word-1>")
TEXTS = ["a <word-0>", "<word-1> dog", "a cat<word-0> dog", "a dog"]


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def vectors(pipeline):
    scale = np.asarray(word_table(pipeline.params["text_encoder"])).std()
    return dict(zip(WORDS, scale * np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32), strict=True))


def test_prompts_with_pseudo_words_equal_diffusers(pipeline, vectors):
    """Token ids, text states and images; another pipeline of diffusers, because it changes the one it is told."""
    theirs = conftest.torch_pipeline("sd1")
    for word, vector in vectors.items():
        theirs.load_textual_inversion({word: torch.tensor(vector)}, token=word)
    ours = words.added(pipeline, vectors)
    for text in TEXTS:
        assert ours.tokenizers["tokenizer"](text).input_ids == theirs.tokenizer(text).input_ids, text
        embeds = theirs.encode_prompt(text, "cpu", 1, False)[0]
        context = np.asarray(backbones.condition(ours, [text]).context)
        np.testing.assert_allclose(context, embeds.detach().numpy(), rtol=1e-4, atol=1e-5)
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype(np.float32)
    images = generate(ours, TEXTS[:1], [0], steps=2, latents=noise)
    expected = theirs(
        TEXTS[:1], latents=torch.tensor(noise.transpose(0, 3, 1, 2)), num_inference_steps=2, output_type="np"
    ).images
    assert np.abs(images[0] / 255 - expected[0]).max() < 2 / 255


def test_the_given_pipeline_stays_as_it_is(pipeline, vectors):
    before = len(pipeline.tokenizers["tokenizer"]), word_table(pipeline.params["text_encoder"]).shape
    ours = words.added(pipeline, vectors)
    assert before == (len(pipeline.tokenizers["tokenizer"]), word_table(pipeline.params["text_encoder"]).shape)
    assert ours.configs["text_encoder"]["vocab_size"] == before[0] + 2 != pipeline.configs["text_encoder"]["vocab_size"]
    assert ours.params["unet"] is pipeline.params["unet"] and words.added(pipeline, {}) is pipeline


def test_a_pseudo_word_with_the_vector_of_a_word_draws_what_it_draws(pipeline):
    ours = words.added(pipeline, {"<word-0>": word_vector(pipeline, "cat", "word")})
    drawn = generate(ours, ["a <word-0>", "a cat"], [3, 3], steps=2)
    np.testing.assert_array_equal(drawn[0], drawn[1])


def test_a_pipeline_with_pseudo_words_is_saved_for_diffusers(pipeline, vectors, tmp_path):
    convert.save_diffusers(words.added(pipeline, vectors), tmp_path)
    again = convert.load(tmp_path)
    np.testing.assert_array_equal(word_table(again.params["text_encoder"])[-2:], np.stack(list(vectors.values())))


@pytest.mark.parametrize("word", ["cat", "", " <w>", "<Word>"])
def test_what_is_no_new_word_is_refused(pipeline, vectors, word):
    with pytest.raises(ValueError, match="cannot be added"):
        words.added(pipeline, {word: vectors["<word-0>"]})


def test_what_is_no_vector_of_the_table_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"expected 32 finite numbers, found shape \(31,\)"):
        words.added(pipeline, {"<word-0>": np.zeros(31)})
    with pytest.raises(ValueError, match="found some that are not"):
        words.added(pipeline, {"<word-0>": np.full(32, np.nan)})


def test_a_backbone_with_several_encoders_is_refused(reference):
    with pytest.raises(ValueError, match="not defined for SDXL"):
        words.added(convert.load(reference("sdxl")[1]), {"<word-0>": np.zeros(16)})
