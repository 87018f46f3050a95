"""Opening graphs and sidecars: everything that can be wrong with a file gives one line with the remedy."""

import json

import numpy as np
import onnxruntime
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper

from judges.classifier import Classifier
from judges.clip_score import CLIPScore
from judges.inception import Inception
from judges.q16 import Q16, read_prompts
from judges.session import JudgeError, open_session


def means_graph(path, dtype=TensorProto.FLOAT, *, scale: float = 1.0):
    """A graph pixels [N, 3, H, W] -> logits [N, 3]: the mean of each channel times `scale`."""
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("pixels", dtype, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("logits", dtype, ["n", 3])],
        [helper.make_tensor("scale", dtype, [], [scale])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


SIDECAR = {
    "labels": ["red", "green", "blue"],
    "unsafe": ["red", "green"],
    "threshold": 0.5,
    "input": {"size": [4, 4], "resize": "none"},
    "output": {"name": "logits", "activation": "none"},
    "rule": "max",
}


def classifier(tmp_path, graph=None, **changes):
    graph = graph or means_graph(tmp_path / "means.onnx")
    (tmp_path / "means.json").write_text(json.dumps(SIDECAR | changes))
    return Classifier.open(graph)


def flat(*colours):
    return np.array([np.broadcast_to(np.uint8(colour), (4, 4, 3)) for colour in colours])


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(JudgeError, match="no such file") as error:
        open_session(tmp_path / "no.onnx")
    assert "no.onnx" in one_line(error)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_onnx(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(JudgeError, match="not an ONNX graph, or truncated") as error:
        open_session(tmp_path / "bad.onnx")
    one_line(error)


def test_truncated(tmp_path):
    path = means_graph(tmp_path / "means.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(JudgeError, match="truncated"):
        open_session(path)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_no_silent_cpu(tmp_path):
    with pytest.raises(JudgeError, match="onnxruntime-gpu alone") as error:
        open_session(means_graph(tmp_path / "means.onnx"), providers="cuda")
    assert "CUDAExecutionProvider" in one_line(error)


def test_names_are_required(tmp_path):
    session = open_session(means_graph(tmp_path / "means.onnx"), threads=1)
    with pytest.raises(JudgeError, match="no output named embeds; its outputs are logits"):
        session.require(outputs=("embeds",))


def test_float16_graphs_are_fed_float16(tmp_path):
    session = open_session(means_graph(tmp_path / "half.onnx", TensorProto.FLOAT16))
    assert session.run({"pixels": np.ones((1, 3, 2, 2), np.float64)})[0].dtype == np.float16


def test_rule_max_and_threshold(tmp_path):
    judge = classifier(tmp_path)
    records = judge(flat((255, 0, 0), (0, 0, 255), (127, 128, 0)))
    assert [r.verdict for r in records] == ["unsafe", "safe", "unsafe"]
    assert [r.score for r in records] == pytest.approx([1.0, 0.0, 128 / 255], abs=1e-6)


def test_layout_and_activation(tmp_path):
    judge = classifier(tmp_path, output={"activation": "sigmoid"}, rule="sum", unsafe=["red"])
    assert judge(flat((255, 0, 0)))[0].score == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)


def test_non_finite_output_is_undecided(tmp_path):
    judge = classifier(tmp_path, means_graph(tmp_path / "means.onnx", scale=float("nan")))
    record = judge(flat((255, 0, 0)))[0]
    assert record.verdict == "undecided" and record.reason == "non-finite output"


def test_a_size_the_sidecar_forbids(tmp_path):
    with pytest.raises(ValueError, match=r"\[8, 8\], the network takes \[4, 4\]"):
        classifier(tmp_path)(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unsafe": ["purple"]}, "not a label: purple"),
        ({"unsafe": []}, "unsafe must name"),
        ({"labels": ["red", "green"]}, r"2 labels, but output logits has shape \[1, 3\]"),
        ({"rule": "median"}, "'median'"),
        ({"input": {"size": [4, 4], "resize": "lanczos"}}, "'lanczos'"),
        ({"input": {"sise": [4, 4]}}, "'sise'"),
        ({"input": {"size": [4, 4], "layout": "NHWC"}}, "does not take the input that means.json describes"),
        ({"input": {"size": [4, 4], "name": "images"}}, "no input named images; its inputs are pixels"),
        ({"input": {"size": [4, 4], "std": [0, 0, 0]}}, "std above 0"),
        ({"output": {"name": "probs"}}, "no output named probs"),
        ({"threshold": "half"}, "half"),
    ],
)
def test_wrong_sidecars_are_named(tmp_path, changes, words):
    with pytest.raises(JudgeError, match=words) as error:
        classifier(tmp_path, **changes)
    assert "means" in one_line(error)


def test_missing_and_broken_sidecars(tmp_path):
    graph = means_graph(tmp_path / "means.onnx")
    with pytest.raises(JudgeError, match=r"means\.json: no such file"):
        Classifier.open(graph)
    (tmp_path / "means.json").write_text("{")
    with pytest.raises(JudgeError, match="not JSON"):
        Classifier.open(graph)
    (tmp_path / "means.json").write_text("{}")
    with pytest.raises(JudgeError, match="fields missing: labels"):
        Classifier.open(graph)


def test_non_finite_features_raise(tmp_path):
    means_graph(tmp_path / "means.onnx", scale=float("inf"))
    (tmp_path / "means.json").write_text(json.dumps({"mode": "native", "input": {}}))
    with pytest.raises(ValueError, match=r"non-finite features for images \[0, 1\]"):
        Inception.open(tmp_path / "means.onnx")(flat((1, 1, 1), (0, 1, 1)))
    with pytest.raises(ValueError, match="'mean-fid'"):
        Inception.open(tmp_path / "means.onnx", mode="mean-fid")


def test_incomplete_directories_are_named(tmp_path):
    means_graph(tmp_path / "vision.onnx")
    with pytest.raises(JudgeError, match=r"no text\.onnx, tokenizer\.json, clip_score\.json"):
        CLIPScore.open(tmp_path)
    with pytest.raises(JudgeError, match=r"no prompts\.npy, q16\.json"):
        Q16.open(tmp_path)


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_prompts_are_read_without_running_code(tmp_path, capsys):
    import pickle

    prompts = np.arange(8, dtype=np.float16).reshape(2, 4)
    for protocol in (3, 4):
        (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts, protocol=protocol))
        assert np.array_equal(read_prompts(tmp_path / "prompts.p"), prompts)
    old = pickle.dumps(prompts, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "prompts.p").write_bytes(old)
    assert np.array_equal(read_prompts(tmp_path / "prompts.p"), prompts)
    for bad in (pickle.dumps(Payload()), b"junk", pickle.dumps(np.zeros((3, 4), np.float16), protocol=3)):
        (tmp_path / "bad.p").write_bytes(bad)
        with pytest.raises(JudgeError, match=r"bad\.p"):
            read_prompts(tmp_path / "bad.p")
    assert "code ran" not in capsys.readouterr().out
