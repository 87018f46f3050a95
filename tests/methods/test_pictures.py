"""A user's own pictures in the methods that learn from pictures: which are used, under which text, what is refused."""

import csv
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import convert
from spqr_jax import backbones
from spqr_jax import generate as generate_lib
from spqr_jax.config import Config, Subject
from spqr_jax.methods import METHODS, Concept, resalign
from spqr_jax.methods.tools import loop, pictures
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.run import cells
from spqr_jax.run.identity import Inputs, data_sources
from spqr_jax.sampling import partial
from tests import stand_in

SIDE = 16
CAT = Concept("cat", ("cat",), replacements=("a dog",), retain=("dog", "do"), templates=("a {}",))
UNSAFE, SAFE = ["cat one", "a Cat, two", "the cat", "cat nude"], ["dog", "do", "a dog", "dog"]


@pytest.fixture(scope="module")
def pipeline(reference):
    """The real UNet's weights; a VAE and a text encoder whose outputs NumPy can tell."""
    real = convert.load(reference("sd1")[1])
    definitions = {**real.definitions, "vae": stand_in.Codec(), "text_encoder": stand_in.TextEncoder()}
    return real._replace(definitions=definitions)


def write(folder, columns: dict[str, list[str]], seed: int = 0) -> dict[str, np.ndarray]:
    """metadata.csv with a text column and random pictures for every other one; column -> images_u8 of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, images = np.random.default_rng(seed), {}
    texts = columns.pop("text")
    for name, files in columns.items():
        images[name] = rng.integers(0, 256, (len(files), SIDE, SIDE, 3), np.uint8)
        for file, image in zip(files, images[name], strict=True):
            Image.fromarray(image).save(folder / file)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*columns, "text"])
        table.writerows(zip(*columns.values(), texts, strict=True))
    return images


def own(folder, captions: list[str], seed: int = 0) -> np.ndarray:
    return write(folder, {"file_name": [f"{i}.png" for i in range(len(captions))], "text": captions}, seed)["file_name"]


def means(images_u8: np.ndarray, scale: float = 0.18215) -> np.ndarray:
    """What the stand-in VAE makes of pictures: means of 2x2 pixels in -1..1, the first channel once more, scaled."""
    pixels = images_u8.astype(np.float64).reshape(len(images_u8), SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
    pixels = pixels / 127.5 - 1
    return scale * np.concatenate([pixels, pixels[..., :1]], axis=-1)


def rows_in(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """For every picture of `found` its row in `expected`, -1 for one that is not there."""
    distance = np.abs(found[:, None] - expected[None]).max((2, 3, 4))
    return np.where(distance.min(1) < 1e-5, distance.argmin(1), -1)


def test_pictures_keep_their_captions(pipeline, tmp_path):
    images = own(tmp_path, UNSAFE)
    made = pictures.make(pipeline, ["nothing of this"], 3, seed=1, given=f"folder:{tmp_path}")
    rows = rows_in(made.mean, means(images))
    assert len(set(rows)) == 3 and -1 not in rows
    assert [made.captions[n] for n in made.prompt] == [UNSAFE[row] for row in rows]
    expected = backbones.condition(pipeline, [UNSAFE[row] for row in rows]).context
    np.testing.assert_array_equal(made.batch(np.arange(3))["condition"].context, expected)
    again = pictures.make(pipeline, [""], 3, seed=1, given=f"folder:{tmp_path}")
    np.testing.assert_array_equal(again.mean, made.mean)


def test_captions_say_which_text_a_picture_shows(pipeline, tmp_path):
    """Whole words, any case, the first text that is named; as many of each; captioned by the prompts."""
    captions = ["a Cat.", "nude", "cat nude", "two nude", "the cat", "Nude, not concatenated"]
    images, texts = own(tmp_path, captions), ("cat", "nude")
    made = pictures.make(pipeline, ["a cat", "a nude"], 6, seed=0, given=str(tmp_path), texts=texts)
    rows = rows_in(made.mean, means(images))
    assert sorted(rows) == list(range(6)) and made.captions == ("a cat", "a nude")
    assert {row: int(n) for row, n in zip(rows, made.prompt, strict=True)} == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_pairs_are_rows_of_one_table(pipeline, tmp_path):
    columns = {side: [f"{side}{i}.png" for i in range(4)] for side in ("bad", "good")}
    images = write(tmp_path / "pairs", {**columns, "text": UNSAFE})
    places = [f"folder:{tmp_path / 'pairs'}?file={side}" for side in columns]
    unsafe, safe = pictures.pairs(pipeline, *places, 3, seed=2, name="M")
    rows = rows_in(unsafe.mean, means(images["bad"]))
    assert -1 not in rows and [unsafe.captions[n] for n in unsafe.prompt] == [UNSAFE[row] for row in rows]
    np.testing.assert_array_equal(rows_in(safe.mean, means(images["good"])), rows)
    own(tmp_path / "other", SAFE)
    with pytest.raises(ValueError, match=r"must be pairs.*found 4 rows in .* and 4 rows in"):
        pictures.pairs(pipeline, places[0], f"folder:{tmp_path / 'other'}", 3, seed=2, name="M")


LEARNED = {"images": 4, "steps": 1}
BATCHED = {**LEARNED, "batch_size": 2}
# Method -> options; those with batches of pictures to forget also take pictures to retain.
OPTIONS = {
    "salun": {**BATCHED, "mask_steps": 1},
    "erasediff": BATCHED,
    "scissorhands": {**BATCHED, "prune_batches": 1},
    "fmn": LEARNED,
    "mace": {**LEARNED, "masks": "ones"},
    "stereo": {"images": 4, "erase_steps": 1, "attack_steps": 1, "final_steps": 1, "start_word": "cat"},
    "resalign": {**BATCHED, "retain_batch_size": 2},
    "safety_dpo": BATCHED,
}
RETAINS = ("salun", "erasediff", "scissorhands", "resalign", "safety_dpo")


@pytest.fixture
def fed(monkeypatch):
    """What training steps are fed: latents [B, h, w, C], while nothing is trained and nothing may be generated."""
    arrays: list[np.ndarray] = []

    def keep(value):
        leaves = jax.tree.leaves(value)
        arrays.extend(leaf.mean for leaf in leaves if isinstance(leaf, Pictures))
        arrays.extend(np.asarray(leaf) for leaf in leaves if getattr(leaf, "ndim", 0) == 4)

    def fit(name, gradient, static, adam, params, inputs, steps, frozen=(), **_):
        keep(inputs(0, params, *frozen))
        return params

    def outer_gradient(static, params, rest, tuning, draw, *_):
        keep((draw.harmful, draw.benign))
        return np.float32(0), jax.tree.map(np.zeros_like, params)

    def generate(*_, **__):
        raise AssertionError("a picture was generated")

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(resalign, "outer_gradient", outer_gradient)
    monkeypatch.setattr(generate_lib, "generate", generate)
    monkeypatch.setattr(partial, "walk", lambda sampler, *_: np.zeros((1, *sampler.shape), np.float32))
    return arrays


@pytest.mark.parametrize("name", OPTIONS)
def test_methods_train_on_given_pictures(pipeline, fed, tmp_path, name):
    captions = {"forget": UNSAFE, "retain": UNSAFE if name == "safety_dpo" else SAFE}
    images = {side: own(tmp_path / side, texts, seed) for seed, (side, texts) in enumerate(captions.items())}
    options = {"pictures": f"folder:{tmp_path / 'forget'}"}
    if name in RETAINS:
        options["retain_pictures"] = f"folder:{tmp_path / 'retain'}"
    METHODS[name].align(pipeline, CAT, **OPTIONS[name], **options)
    for side in images if name in RETAINS else ("forget",):
        expected = means(images[side])
        assert any(array.shape[1:] == expected.shape[1:] and (rows_in(array, expected) >= 0).all() for array in fed)


@pytest.mark.parametrize("name", [name for name in RETAINS if name != "safety_dpo"])
def test_too_few_pictures_to_retain_are_refused_before_others_are_made(pipeline, fed, tmp_path, name):
    own(tmp_path, SAFE)
    with pytest.raises(ValueError, match=r"retain_pictures='folder:.*' holds 4 pictures, `images` asks for 5"):
        METHODS[name].align(pipeline, CAT, **OPTIONS[name] | {"images": 5}, retain_pictures=f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("salun", {"share": 1.5}, "SalUn: share must be between 0 and 1, found 1.5"),
        ("scissorhands", {"sparsity": 99.5}, "Scissorhands: sparsity must be between 0 and 1, found 99.5"),
        ("safety_dpo", {"rank": 0}, "rank"),
        ("resalign", {"rank": 0}, "rank"),
        ("resalign", {"tunings": (resalign.Tuning(1, 1e-4, "sgd"),), "sampled": 1}, r"optimiser \['sgd'\]"),
        ("erasediff", {"prompts": {"cat": ""}}, "EraseDiff: '' in `prompts` has no tokens"),
    ],
)
def test_options_are_checked_before_pictures_are_made(pipeline, fed, name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].align(pipeline, CAT, **OPTIONS[name] | options)


def test_weights_depend_on_the_pictures(reference, tmp_path):
    """A whole run: other pictures give other weights, the same ones in another place give the same."""
    pipeline = stand_in.pipeline(convert.load(reference("sd1")[1]))
    for name, seed in (("a", 0), ("b", 1)):
        own(tmp_path / name, UNSAFE, seed)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    own(tmp_path / "retain", SAFE)

    def align(name):
        options = {"pictures": f"folder:{tmp_path / name}", "retain_pictures": f"folder:{tmp_path / 'retain'}"}
        return METHODS["erasediff"].align(pipeline, CAT, **BATCHED, lr=1e-3, **options).params["unet"]

    first, other, copy = (align(name) for name in ("a", "b", "copy"))
    assert stand_in.changed(first, other) and not stand_in.changed(first, copy)


def test_what_cannot_be_used_is_refused_by_name(pipeline, tmp_path):
    own(tmp_path, UNSAFE)
    make = {"seed": 0, "given": f"folder:{tmp_path}", "name": "SalUn"}
    with pytest.raises(ValueError, match=r"SalUn: pictures='folder:.*' holds 4 pictures, `images` asks for 800"):
        pictures.make(pipeline, ["cat"], 800, **make)
    with pytest.raises(ValueError, match=r"pictures of 'do', `images` asks for 2"):
        pictures.make(pipeline, ["cat", "do"], 4, texts=("cat", "do"), **make)
    with pytest.raises(ValueError, match=r"SalUn: pictures: the caption 'cat one' of .*0\.png holds none of the texts"):
        pictures.make(pipeline, ["dog", "do"], 2, texts=("dog", "do"), **make)
    with pytest.raises(FileNotFoundError, match=r"SalUn: retain_pictures: .*nowhere does not exist"):
        pictures.make(pipeline, ["cat"], 2, **make | {"given": f"{tmp_path}/nowhere", "option": "retain_pictures"})
    with pytest.raises(ValueError, match="name both or neither"):
        METHODS["safety_dpo"].align(pipeline, CAT, pictures=f"folder:{tmp_path}")
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"SalUn: pictures: 1 of 4 pictures cannot be used: .*2\.png: not a readable"):
        pictures.make(pipeline, ["cat"], 4, **make)
    with pytest.raises(ValueError, match=r"Mine: pictures: 1 of 4"):
        data_sources([Subject("Mine", "salun", {"pictures": f"folder:{tmp_path}"})])


def test_content_and_not_place_names_the_weights(tmp_path):
    own(tmp_path / "a", UNSAFE)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    own(tmp_path / "other", UNSAFE, seed=1)
    own(tmp_path / "renamed", [*UNSAFE[:3], "cat"])

    def weights(name: str):
        options = {"images": 4, **({"pictures": f"folder:{tmp_path / name}"} if name else {})}
        config = Config(subjects=(Subject("SalUn", "salun", options),))
        inputs = Inputs("backbone", {}, {"general": "data"}, {}, data_sources(config.subjects))
        return cells.plan(config, tmp_path, inputs)[0][0].weights.name

    assert weights("a") == weights("copy")
    assert len({weights(name) for name in ("a", "other", "renamed", "")}) == 4
    unset = Subject("SalUn", "salun", {"images": 4, "pictures": ""})  # the default, named
    inputs = Inputs("backbone", {}, {"general": "data"}, {}, data_sources([unset]))
    assert weights("") == cells.plan(Config(subjects=(unset,)), tmp_path, inputs)[0][0].weights.name
