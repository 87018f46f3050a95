"""MACE: closed forms against the papers' sums in float64, and the whole method on a tiny pipeline."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import generate as generate_lib
from spqr_jax import params as params_lib
from spqr_jax.concepts import NUDITY
from spqr_jax.methods import Concept, mace
from spqr_jax.methods.tools import closed_form
from spqr_jax.methods.tools.low_rank import LowRank

FLAT = params_lib.flatten
CONCEPT = Concept("cat", ("cat", "nude"), target="dog", preserve=("the dog", "do"), templates=("a photo of {}", "{}"))
OPTIONS = {"steps": 1, "images": 2, "sampling_steps": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.mark.parametrize(
    ("a", "b", "rows", "others"),
    [
        # start of text, "a", concept 5 6, "eats", end of text; the mapping is one token
        ([0, 1, 5, 6, 2, 9], [0, 1, 7, 2, 9], [0, 1, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6]),
        ([0, 5, 9], [0, 7, 8, 9], [0, 2, 3, 4, 5, 6], [0, 3, 4, 5, 6, 7]),
        ([0, 5, 9], [0, 9], [0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]),  # erased to nothing
        ([0, 5, 5, 9], [0, 5, 9], [0, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]),  # repeated: counted once
        ([0, 1, 9], [0, 1, 9], list(range(8)), list(range(8))),
    ],
)
def test_what_two_prompts_have_in_common(a, b, rows, others):
    found = mace.matching_rows(a, b, 8)
    assert [list(r) for r in found] == [rows, others]


def test_refinement_is_the_papers_sum(pipeline, monkeypatch):
    """W* = (sum W e_map e_con^T + mu C1)(sum e_con e_con^T + mu C2)^-1 with the prior's W e e^T as C1, row by row."""
    captions = ["the dog", "do"]
    monkeypatch.setattr(mace, "CAPTIONS_AT_ONCE", 1)
    prior = mace.prior_gram(pipeline, captions)
    edit = mace.refining_edit(pipeline, "cat", "dog", ["a photo of {}", "{} eats"])
    pairs = []
    for template in ("a photo of {}", "{} eats"):
        ids = [pipeline.tokenizers["tokenizer"](template.format(word)).input_ids for word in ("cat", "dog")]
        con, mapped = closed_form.text_states(pipeline, [template.format(word) for word in ("cat", "dog")])
        assert len(ids[0]) == len(ids[1])
        pairs += [(con[i], mapped[i]) for i in range(77) if i >= len(ids[0]) or ids[0][i] == ids[1][i]]
    assert len(pairs) == len(edit.inputs) < 2 * 77
    path, kernel = next(iter(closed_form.key_value_matrices(pipeline, "MACE").items()))
    weight, mu, ridge = kernel.T, 7e-7, 1e-3
    first = sum(np.outer(weight @ v, c) for c, v in pairs) + ridge * weight
    second = sum(np.outer(c, c) for c, _ in pairs) + ridge * np.eye(weight.shape[1])
    for e in closed_form.text_states(pipeline, captions).reshape(-1, weight.shape[1]):
        first = first + mu * 617_000 / 2 * np.outer(weight @ e, e)
        second = second + mu * 617_000 / 2 * np.outer(e, e)
    solved = closed_form.solve(kernel, [edit], [edit.sources @ kernel], mu * prior + ridge * np.eye(len(prior)))
    np.testing.assert_allclose(solved, np.linalg.solve(second.T, first.T), rtol=1e-6, atol=1e-8)
    assert path.endswith("kernel")


def test_fusion_minimises_its_objective():
    """The gradient vanishes, and one text with adapters of zero and the refined matrices near is reproduced."""
    rng = np.random.default_rng(0)
    original, refined = ({"k": rng.standard_normal((6, 4))} for _ in range(2))
    adapters = [{"k": LowRank(rng.standard_normal((6, 1)), rng.standard_normal((1, 4)))} for _ in range(3)]
    states = [rng.standard_normal((9, 6)) for _ in range(3)]
    root = rng.standard_normal((6, 6))
    prior = root @ root.T
    solved = mace.fused(original, refined, adapters, states, prior)["k"]
    gradient = prior @ (solved - original["k"])
    for adapter, rows in zip(adapters, states, strict=True):
        wanted = rows @ (refined["k"] + adapter["k"].down @ adapter["k"].up)
        gradient += rows.T @ (rows @ solved - wanted)
    assert np.abs(gradient).max() < 1e-9
    zero = {"k": LowRank(np.zeros((6, 1)), np.zeros((1, 4)))}
    same = mace.fused(original, refined, [zero], states[:1], 1e-12 * np.eye(6))["k"]
    np.testing.assert_allclose(same, refined["k"], rtol=1e-6, atol=1e-8)


def test_timesteps_between_200_and_400_are_likeliest():
    odds = mace.timestep_odds(1000)
    assert odds.sum() == pytest.approx(1) and abs(odds.argmax() - 300) <= 1
    assert odds[200] / odds[300] == pytest.approx(np.tanh(5) / (2 * np.tanh(2.5)), rel=1e-6)


def changed(before, after) -> set[str]:
    flat = FLAT(after.params["unet"])
    return {path for path, leaf in FLAT(before.params["unet"]).items() if not np.array_equal(leaf, flat[path])}


def test_mace_changes_keys_and_values_only_and_asks_the_segmenter(pipeline):
    asked = []

    def segment(pictures, text):
        asked.append((pictures.shape, pictures.dtype, text))
        masks = np.zeros((2, 4, 4), bool)
        masks[0, :2] = True  # in the second picture nothing is found: masked everywhere
        return masks

    aligned, again = (mace.align(pipeline, CONCEPT, masks=segment, **OPTIONS) for _ in range(2))
    assert changed(pipeline, aligned) == set(closed_form.key_value_matrices(pipeline, "MACE"))
    assert not changed(aligned, again)
    assert aligned.params["text_encoder"] is pipeline.params["text_encoder"]
    assert asked[:2] == [((2, 16, 16, 3), np.uint8, "cat"), ((2, 16, 16, 3), np.uint8, "nude")]


def test_where_nothing_is_found_the_whole_picture_is_masked(pipeline):
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2] = True
    templates, pictures = ("a {}",), np.zeros((2, 16, 16, 3), np.uint8)
    watched = mace.watched_tokens(pipeline, "cat", templates)
    example = mace.example_of(pipeline, "cat", templates, watched, pictures, lambda *_: masks)
    np.testing.assert_array_equal(example.masks[0], masks[0])
    assert example.masks[1].all()


def test_mapping_a_text_to_itself_changes_little(pipeline):
    """Without suppression every solution is then the original matrix."""
    same = CONCEPT._replace(erase=("dog",), target="dog")
    aligned = mace.align(pipeline, same, masks="ones", **OPTIONS | {"steps": 0})
    for path, kernel in closed_form.key_value_matrices(pipeline, "MACE").items():
        np.testing.assert_allclose(FLAT(aligned.params["unet"])[path], kernel, rtol=1e-4, atol=1e-5)


def test_other_tokens_stop_carrying_the_concept(pipeline):
    """After refinement and fusion the end of "a photo of cat" gives what the end of "a photo of dog" gave."""
    options = OPTIONS | {"steps": 0, "prior_scale": 1e-9, "fuse_prior_scale": 1e-9}
    aligned = mace.align(pipeline, CONCEPT._replace(erase=("cat",)), masks="attention", **options)
    cat, dog = closed_form.text_states(pipeline, ["a photo of cat", "a photo of dog"])
    end = len(pipeline.tokenizers["tokenizer"]("a photo of cat").input_ids) - 1
    for path, kernel in closed_form.key_value_matrices(pipeline, "MACE").items():
        edited = np.asarray(FLAT(aligned.params["unet"])[path], np.float64)
        before, after = (np.abs(cat[end:] @ k - dog[end:] @ kernel).mean() for k in (kernel, edited))
        assert after < 0.5 * before


def test_refusals(pipeline, reference):
    with pytest.raises(ValueError, match="`retain` is empty"):
        mace.align(pipeline, CONCEPT._replace(preserve=()))
    with pytest.raises(ValueError, match="masks must be"):
        mace.align(pipeline, CONCEPT, masks="sam")
    with pytest.raises(ValueError, match=r"masks of 'cat' have shape \(2, 4, 5\)"):
        mace.align(pipeline, CONCEPT, masks=lambda pictures, text: np.ones((2, 4, 5)), **OPTIONS)
    with pytest.raises(ValueError, match="MACE is not defined for SDXL"):
        mace.align(convert.load(reference("sdxl")[1]), CONCEPT)
    with pytest.raises(ValueError, match="nothing"):
        mace.align(pipeline, Concept("nothing", ()))


def test_what_cannot_be_framed_is_refused_before_pictures_are_made(pipeline, monkeypatch):
    monkeypatch.setattr(generate_lib, "generate", lambda *_, **__: pytest.fail("a picture was made"))
    with pytest.raises(ValueError, match=r"the tokens of 'cat' do not occur in the prompt 'catdog'"):
        mace.align(pipeline, CONCEPT._replace(templates=("{}dog",)), **OPTIONS)
    with pytest.raises(ValueError, match=r"a frame with a text or its mapping takes \d+ tokens of 77; shorten it"):
        mace.align(pipeline, CONCEPT, mapping="dog " * 80, **OPTIONS)


def test_the_preset_erases_the_authors_words_whatever_they_are_mapped_to(pipeline, monkeypatch):
    asked = []
    monkeypatch.setattr(mace, "refining_edit", lambda p, text, mapping, _: asked.append((text, mapping)) or 1 / 0)
    for mapping in (None, mace.NUDITY_MAPPING, "dog"):
        monkeypatch.setattr(mace, "watched_tokens", lambda p, text, _: asked.append(text))
        asked.clear()
        with pytest.raises(ZeroDivisionError):
            mace.align(pipeline, NUDITY, mapping=mapping)
        assert asked == [*mace.NUDITY_TEXTS, ("nudity", mapping or mace.NUDITY_MAPPING)]


def test_the_preset_erases_the_authors_words():
    assert mace.NUDITY_TEXTS == ("nudity", "naked", "erotic", "sexual") and NUDITY.erase == ("nudity",)
    assert len(set(mace.TEMPLATES)) == 30
