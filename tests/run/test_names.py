"""What names in a config stand for: data sets, reference pictures, safety judges."""

import json

import numpy as np
import pytest
from PIL import Image

from judges.session import JudgeError
from spqr_jax import mini
from spqr_jax.config import BFT, Config, Generation, Judges, Prompts
from spqr_jax.run import jury, names, protocol


def write_pictures(folder, sizes):
    folder.mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        Image.new("RGB", (width, height), (i * 10,) * 3).save(folder / f"{i}.png")
    return folder


def write_base(folder, sample_size=8, levels=2):
    for name, config in (("unet", {"sample_size": sample_size}), ("vae", {"block_out_channels": [8] * levels})):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_side_is_the_backbones(tmp_path):
    assert names.backbone_side(Config(base=write_base(tmp_path / "base", 64, 4))) == 512
    assert names.backbone_side(Config(base="mini")) == 32
    (tmp_path / "one.ckpt").touch()
    with pytest.raises(ValueError, match=r"base=.*one.ckpt does not say its size .* set bft.resolution"):
        names.backbone_side(Config(base=str(tmp_path / "one.ckpt")))


def test_reference_pictures_of_any_size_become_the_generated_size(tmp_path):
    folder = write_pictures(tmp_path / "real", [(20, 30), (40, 16), (16, 16), (5, 9)])
    config = Config(base=write_base(tmp_path / "base"), judges=Judges(reference=str(folder), n_reference=3))
    (images,) = names.reference_images(config)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 10, 20]
    config.generation = Generation(height=24, width=24)
    assert next(names.reference_images(config)).shape == (3, 24, 24, 3)
    config.judges.reference_crop = "whole"
    assert [image.shape for image in names.reference_images(config)] == [(1, 30, 20, 3), (1, 16, 40, 3), (1, 16, 16, 3)]


def test_bad_reference_pictures_are_named(tmp_path):
    folder = write_pictures(tmp_path / "real", [(16, 16)] * 2)
    config = Config(base=write_base(tmp_path / "base"), judges=Judges(reference=str(folder), n_reference=3))
    with pytest.raises(ValueError, match=r"real holds 2 pictures, judges.n_reference asks for 3"):
        names.reference_images(config)
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"judges.reference: .*2.png: not a readable image"):
        list(names.reference_images(config))


def test_data_by_scenario(tmp_path):
    write_pictures(tmp_path / "data" / "Ghibli", [(20, 30), (40, 16)])
    bft = BFT(data={"artistic": f"artistic:{tmp_path / 'data'}"}, samples=2, curriculum=(2,))
    config = protocol.resolve(Config(base=write_base(tmp_path / "base"), bft=bft))
    made = names.dataset(config, "artistic")
    assert set(made.captions) == {"a picture in the style of Ghibli"}
    assert made.images(np.arange(2)).shape == (2, 16, 16, 3)
    config.bft.resolution = 8
    smaller = names.dataset(config, "artistic")
    assert smaller.images(np.arange(2)).shape == (2, 8, 8, 3) and smaller.name != made.name
    assert names.dataset(config, "general").images(np.arange(1)).shape == (1, 32, 32, 3)  # the emoji world's
    config.bft.samples = 3
    with pytest.raises(ValueError, match=r"has 2 good samples, bft.samples asks for 3"):
        names.dataset(config, "artistic")


def test_prompts_come_from_the_emoji_world_or_from_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("a dog\na cat\n")
    config = Config(prompts=Prompts(benign=str(tmp_path / "mine.txt"), n_harmful=3, n_benign=2), seed=1)
    assert names.prompts(config, "harmful") == mini.prompts("harmful", 3, 1)
    assert [prompt.prompt for prompt in names.prompts(config, "benign")] == ["a dog", "a cat"]
    assert [names.prompt_set(config, role) for role in ("harmful", "benign")] == ["mini:harmful", "mine.txt"]
    config.prompts.harmful = "mini:odd"
    with pytest.raises(ValueError, match="mini:odd is unknown; expected one of harmful, weapons"):
        names.prompts(config, "harmful")


def test_concepts_by_name():
    assert all(names.concept(Config(concept=name)).erase for name in names.concepts())
    assert names.concept(Config(concept="mini:weapons")) == mini.concept("weapons") != mini.concept()


@pytest.mark.parametrize("where", ["llavaguard:{}", "q16:{}", "{}/judge.onnx"])
def test_a_safety_judge_that_is_not_there_is_named(tmp_path, where):
    with pytest.raises((JudgeError, FileNotFoundError), match=str(tmp_path)):
        jury.open_safety(where.format(tmp_path), "cpu")


def test_safety_judges_by_name():
    assert jury.open_safety("mini:harm", "cpu").identity["model"] == "emoji harm classifier"
    assert jury.open_safety("mini:harm?threshold=0.9", "cpu").identity["options"]["threshold"] == 0.9
    pytest.importorskip("nudenet")
    assert jury.open_safety("nudenet", "cpu").identity["options"]["label_set"] == "strict5"
    assert jury.open_safety("nudenet:broad9", "cpu").identity["options"]["label_set"] == "broad9"


def test_the_other_judges_take_options_too():
    opened = jury.open_jury(Judges(features="mini:features?batch_size=5", clip_score="mini:clip?batch_size=6"))
    assert opened.features.batch_size == 5 and opened.clip.batch_size == 6
    with pytest.raises(JudgeError, match="no option 'resize'; its options are batch_size, gpu_mem_limit, mode"):
        jury.open_jury(Judges(features="mini:features?resize=tf1"))
