"""Drawing samples: preprocessing as the reference script's, bad images, names as content hashes, and the check."""

import io
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from spqr_jax import data
from spqr_jax.data import __main__ as command
from spqr_jax.data import check, drawing, pictures, words
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def triangle(size: int, target: int) -> np.ndarray:
    """Antialiased bilinear resize along one axis in float64, from its definition: weights [target, size]."""
    scale = max(size / target, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * size / target
    weights = np.maximum(0, 1 - np.abs(np.arange(size)[None] + 0.5 - centres) / scale)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(41, 64), (64, 41), (40, 40), (9, 23), (16, 16)])
def test_resized_and_cropped_as_the_reference(height, width):
    """Shorter side to 16, antialiased bilinear, longer side rounded down, centre crop as torchvision rounds it."""
    image, side = noise(height, width), 16
    short = min(height, width)
    rows, columns = int(side * height / short), int(side * width / short)
    resized = np.einsum("yh,xw,hwc->yxc", triangle(height, rows), triangle(width, columns), image.astype(np.float64))
    top, left = round((rows - side) / 2.0), round((columns - side) / 2.0)
    ours = pictures.prepare(Image.fromarray(image), Preprocess(side), 0)
    assert ours.shape == (side, side, 3) and ours.dtype == np.uint8
    assert np.abs(ours - resized[top : top + side, left : left + side]).max() < 1.01  # one step of 8-bit rounding


def test_crops_and_flips_are_a_function_of_seed_epoch_and_index():
    image = Image.fromarray(noise(16, 40))

    def made(index=0, **how):
        return pictures.prepare(image, Preprocess(16, crop="random", flip=True, **how), index).tobytes()

    assert made() == made()
    several = [
        {made(index=i) for i in range(20)},
        {made(seed=i) for i in range(20)},
        {made(epoch=i) for i in range(20)},
    ]
    assert all(len(different) > 12 for different in several)
    columns = {np.asarray(image)[:, i : i + 16].tobytes() for i in range(25)}
    mirrored = {np.asarray(image)[:, i : i + 16][:, ::-1].tobytes() for i in range(25)}
    assert several[0] <= columns | mirrored and several[0] & columns and several[0] & mirrored


@pytest.mark.parametrize(
    "content",
    [
        encoded(noise(5, 7)[..., 0], "PNG"),
        encoded(np.dstack([noise(5, 7), noise(5, 7)[..., :1]]), "PNG"),
        encoded(noise(5, 7), "WEBP"),
    ],
    ids=["grey", "alpha", "webp"],
)
def test_every_mode_becomes_rgb(content):
    assert pictures.decode(content).mode == "RGB" and pictures.measure(content) == (7, 5)


def test_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert pictures.decode(encoded(noise(8, 16), "JPEG", exif=exif.tobytes())).size == (8, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_measured_as_exif_turns_it(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(noise(8, 16), kind, exif=exif.tobytes())
        assert pictures.measure(content) == pictures.decode(content).size


JPEG = encoded(noise(64, 64), "JPEG")
BAD = {"truncated.jpg": JPEG[: len(JPEG) // 2], "empty.jpg": b"", "text.jpg": b"<html>not found</html>"}


@pytest.fixture
def folder(tmp_path):
    """Twelve good images in the imagefolder convention."""
    rows = ["file_name,text"]
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(noise(20, 24, i), "JPEG"))
        rows.append(f"{i}.jpg,picture number {i}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    data.load.cache_clear()
    return tmp_path


def add(folder, name, content, caption="a bad one"):
    if content is not None:
        (folder / name).write_bytes(content)
    with (folder / "metadata.csv").open("a") as table:
        table.write(f"{name},{caption}\n")


def test_a_draw_is_shuffled_and_a_function_of_the_seed(folder):
    drawn = data.load(str(folder), 12, side=16)
    assert sorted(drawn.captions) == sorted(f"picture number {i}" for i in range(12))
    assert drawn.captions != tuple(f"picture number {i}" for i in range(12))
    assert drawn.captions == data.load(f"folder:{folder}", 12, side=16).captions
    assert drawn.captions != data.load(str(folder), 12, side=16, seed=1).captions
    assert data.load(str(folder), 5, side=16).captions == drawn.captions[:5]
    rows = np.array([3, 0])
    expected = [Image.open(folder / f"{drawn.captions[i].rpartition(' ')[2]}.jpg") for i in rows]
    made = np.stack([pictures.prepare(image, Preprocess(16), 0) for image in expected])
    np.testing.assert_array_equal(drawn.images(rows), made)


def test_the_name_is_a_hash_of_what_training_sees(folder, tmp_path):
    def name(**how):
        data.load.cache_clear()
        return data.load(str(folder), 12, **{"side": 16, **how}).name

    first = name()
    assert first == name() and first.startswith("folder 12 at 16 px ")
    assert len({first, name(side=8), name(crop="random"), name(flip=True), name(seed=3)}) == 5
    (folder / "3.jpg").write_bytes(encoded(noise(20, 24, 99), "JPEG"))
    changed = name()
    table = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(table.replace("picture number 4", "picture no. 4"))
    assert len({first, changed, name()}) == 3


# Of the samples in `test_names_of_shuffled_data_are_those_of_before`, as named before data had an order.
NAMES = "folder 12 at 16 px 568d3b4fb08492f3", "folder 12 at 16 px 64c67f3d1563912c"


def numbers(drawn: data.Dataset) -> list[int]:
    return [int(caption.rpartition(" ")[2]) for caption in drawn.captions]


def test_drawn_samples_in_the_order_of_the_file(folder):
    assert numbers(data.load(str(folder), 12, side=16, order="file")) == list(range(12))
    drawn, ordered = (data.load(str(folder), 5, side=16, seed=2, order=order) for order in ("shuffled", "file"))
    assert numbers(ordered) == sorted(numbers(drawn)) != numbers(drawn)
    assert ordered.name != drawn.name
    rows = np.array([numbers(drawn).index(number) for number in numbers(ordered)])
    np.testing.assert_array_equal(ordered.images(np.arange(5)), drawn.images(rows))


def test_skipped_samples_leave_no_gap_in_the_order_of_the_file(folder):
    (folder / "3.jpg").write_bytes(b"")
    assert numbers(data.load(str(folder), 11, side=16, order="file")) == [0, 1, 2, *range(4, 12)]


def test_names_of_shuffled_data_are_those_of_before(folder):
    """Ids of cells hold these names. The images are stored without compression, so that no encoder changes them."""
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(b"P6 24 20 255\n" + noise(20, 24, i).tobytes())
    assert data.load(str(folder), 12, side=16, seed=3).name == NAMES[0]
    assert data.load(str(folder), 12, side=16, seed=3, crop="random", flip=True).name == NAMES[1]


def test_orders_and_crops_are_checked_first(folder):
    with pytest.raises(ValueError, match=r"bft\.order='sorted' is unknown; expected shuffled or file"):
        data.load("/nowhere", 5, side=16, order="sorted")
    with pytest.raises(ValueError, match=r"bft\.crop='left' is unknown; expected center or random"):
        data.load("/nowhere", 5, side=16, crop="left")


def test_parts_of_a_mixture_take_turns_in_the_order_of_their_files():
    source = Source("", ("",) * 9, ("",) * 9, lambda row: b"", "", parts=(2, 7))
    drawn = [drawing.Look(row, "", 1, 1, "") for row in (8, 1, 4, 0, 7, 2)]
    assert [found.row for found in drawing.in_file_order(source, drawn)] == [0, 2, 1, 4, 7, 8]


def test_every_pass_has_its_own_crops_and_name(folder):
    drawn = data.load(str(folder), 12, side=16, crop="random")
    rows = np.array([4, 1])
    passes = [drawn.of_pass(number) for number in range(4)]
    assert passes[0].name == drawn.name and len({p.name for p in passes}) == 4
    np.testing.assert_array_equal(passes[0].images(rows), drawn.images(rows))
    assert len({p.images(np.arange(12)).tobytes() for p in passes}) == 4
    np.testing.assert_array_equal(passes[3].of_pass(2).images(rows), passes[2].images(rows))
    for number, p in enumerate(passes):
        files = [numbers(drawn)[row] for row in rows]
        opened = [Image.open(folder / f"{file}.jpg") for file in files]
        how = Preprocess(16, "random", epoch=number)
        made = [pictures.prepare(image, how, file) for image, file in zip(opened, files, strict=True)]
        np.testing.assert_array_equal(p.images(rows), made)


@pytest.mark.parametrize(
    ("how", "square", "changes"),
    [
        ({}, False, False),
        ({"crop": "random"}, False, True),
        ({"crop": "random"}, True, False),
        ({"flip": True}, False, True),
        ({"flip": True}, True, True),
        ({"crop": "random", "flip": True}, True, True),
    ],
)
def test_passes_differ_only_where_crops_or_flips_do(folder, how, square, changes):
    """33 x 32 pixels become 16 x 16, so that such an image counts as square."""
    for i in range(12 if square else 0):
        (folder / f"{i}.jpg").write_bytes(encoded(noise(32 + i % 2, 32, i), "JPEG"))
    drawn = data.load(str(folder), 12, side=16, **how)
    assert (drawn.at_pass is not None) == changes
    if not changes:
        assert drawn.of_pass(7) is drawn
        again = drawing.dataset(*remade(folder, drawn, Preprocess(16, **how, epoch=7)))
        np.testing.assert_array_equal(again.images(np.arange(12)), drawn.images(np.arange(12)))


def remade(folder, drawn: data.Dataset, how: Preprocess):
    source = data.open_source(str(folder))
    return source, list(drawing.look(source, numbers(drawn))), how


def test_geometry_places_the_crop_in_the_image(folder):
    """Cut by hand where `geometry` says, out of the resized image, mirrored where that gives the pixels."""
    drawn = data.load(str(folder), 12, side=16, crop="random", flip=True)
    rows, passes = np.repeat(np.arange(12), 3), np.tile(np.arange(3), 12)
    geometry = drawn.geometries(rows, passes)
    assert geometry.shape == (36, 4) and (geometry[:, :2] == [20, 24]).all()
    assert set(geometry[:, 2]) == {0} and set(geometry[:, 3]) == {0, 1, 2, 3}
    mirrored = []
    for row, number, (_, _, top, left) in zip(rows, passes, geometry, strict=True):
        image = Image.open(folder / f"{numbers(drawn)[row]}.jpg").resize((19, 16), Image.Resampling.BILINEAR)
        whole = np.asarray(image)
        cut = [pixels[top : top + 16, left : left + 16] for pixels in (whole, whole[:, ::-1])]
        (shown,) = drawn.of_pass(number).images(np.array([row]))
        mirrored.append([np.array_equal(pixels, shown) for pixels in cut].index(True))
    assert set(mirrored) == {0, 1}


def test_geometry_of_whole_images():
    drawn = data.from_arrays(noise(8, 12)[None].repeat(3, 0), ["a", "b", "c"])
    assert drawn.geometries(np.array([2, 0]), np.array([0, 5])).tolist() == [[8, 12, 0, 0]] * 2
    bare = data.Dataset(drawn.captions, drawn.images)
    assert bare.geometries(np.array([2]), np.array([0])) is None and bare.of_pass(3) is bare


@pytest.mark.parametrize("name", [*BAD, "missing.jpg"])
def test_bad_pictures_are_listed_and_skipped_up_to_the_limit(folder, caplog, name):
    add(folder, name, BAD.get(name))
    with caplog.at_level("WARNING"):
        assert len(data.load(str(folder), 12, side=16, max_bad=1)) == 12
    with pytest.raises(ValueError, match=rf"bft.max_bad=0 bad samples: .*{name}: \w+"):
        data.load(str(folder), 13, side=16, max_bad=0)


def test_skipped_pictures_are_logged(folder, caplog):
    add(folder, "empty.jpg", b"")
    with caplog.at_level("WARNING"), pytest.raises(ValueError, match=r"has 12 good samples, bft.samples asks"):
        data.load(str(folder), 13, side=16)
    assert "empty.jpg: not a readable image (empty)" in caplog.text


def test_an_empty_caption_is_a_bad_sample(folder):
    add(folder, "1.jpg", None, caption=" ")
    with pytest.raises(ValueError, match="the caption is empty"):
        data.load(str(folder), 13, side=16, max_bad=0)


def test_a_picture_that_vanishes_is_named(folder):
    drawn = data.load(str(folder), 12, side=16)
    (folder / "5.jpg").unlink()
    with pytest.raises(ValueError, match=r"5.jpg: .*readable when the run started"):
        drawn.images(np.arange(12))


def test_order_of_a_mixture():
    parts = Source("", ("",) * 9, ("",) * 9, lambda row: b"", "", parts=(2, 7))
    rows = drawing.order(parts, 0)
    assert sorted(rows) == list(range(9))
    assert [row < 2 for row in rows[:4]] == [True, False, True, False]


class Verdict(NamedTuple):
    verdict: str
    score: float = 0.5
    reason: str = ""


def brightness(images: np.ndarray) -> list[Verdict]:
    """A judge that calls white images unsafe."""
    return [Verdict("unsafe" if image.mean() > 250 else "safe") for image in images]


def test_check_finds_nothing_in_a_clean_folder(folder):
    report = check.check(data.open_source(str(folder)), {"bright": brightness}, side=16)
    said = check.text(report)
    assert not report.wrong and "Nothing is wrong." in said
    assert "12, looked at 12" in said and "most common 24x20" in said and "not safe by bright    0" in said


def test_check_lists_what_is_wrong(folder):
    add(folder, "empty.jpg", b"")
    add(folder, "white.png", encoded(np.full((9, 9, 3), 255, np.uint8)))
    add(folder, "2.jpg", None, caption="a bloody corpse")
    add(folder, "2.jpg", None, caption="a bad one")
    report = check.check(data.open_source(str(folder)), {"bright": brightness}, side=16)
    said = check.text(report)
    assert report.wrong
    assert [where.rpartition("/")[2] for where, _ in report.bad] == ["empty.jpg"]
    assert [what for _, what in report.harmful_captions] == ["bloody, corpse: 'a bloody corpse'"]
    assert [where.rpartition("/")[2] for where, _ in report.judged["bright"]] == ["white.png"]
    assert "repeated captions     2; most often (3 times) 'a bad one'" in said and "repeated images       2" in said


def test_check_looks_at_what_a_run_draws(folder):
    report = check.check(data.open_source(str(folder)), {}, samples=5, seed=4, side=16)
    drawn = data.load(str(folder), 5, side=16, seed=4)
    assert tuple(report.source.captions[found.row] for found in report.looked) == drawn.captions
    assert "not judged" in check.text(report)


def test_the_command(folder, capsys):
    assert command.main(["check", str(folder), "--judges", "harm=mini:harm", "--side", "32"]) in (0, 1)
    assert "not safe by harm" in capsys.readouterr().out
    add(folder, "text.jpg", BAD["text.jpg"])
    assert command.main(["check", str(folder), "--kind", "folder"]) == 1
    assert "text.jpg: not a readable image" in capsys.readouterr().out
    for bad in (["/nowhere"], [str(folder), "--judges", "harm"], [str(folder), "--judges", "harm=/nowhere.onnx"]):
        assert command.main(["check", *bad]) == 2
        assert "spqr_jax.data: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("caption", "hits"),
    [
        ("A NUDE woman, suicidal", ["NUDE", "suicidal"]),
        ("a man holding a gun", ["gun"]),
        ("a bowl of grapes beside rapeseed and a shotgun house", []),
        ("an executive kills time", ["kills"]),
        ("a knife cuts a tomato", []),
        ("self-harm", ["self-harm"]),
    ],
)
def test_harmful_words_are_whole_words(caption, hits):
    assert words.harmful_words(caption) == hits
