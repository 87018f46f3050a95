"""The experiments on Stable Diffusion run unchanged from aligning to the report, on tiny models, prompts and pictures.

Only counts and steps are overridden, and the two safety judges, whose weights cannot be made here.
"""

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

import convert
import launch
from configs import adaptations, paper
from convert import diffusers_dir
from spqr_jax import backbones, data, mini, prompts
from spqr_jax import config as config_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.files import records
from spqr_jax.methods import METHODS
from spqr_jax.run import check, protocol

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(
    p.stem
    for p in CONFIGS.glob("*.py")
    # Those of the emoji world, and that of the profiles beyond the paper's, have tests of their own.
    if p.stem not in ("__init__", "paper", "adaptations") and "mini" not in p.stem
)
N, PICTURES = 4, 8
COUNTS = {
    "prompts.n_harmful": N,
    "prompts.n_benign": N,
    "generation.steps": 1,
    "bft.samples": 4,
    "bft.curriculum": "(2, 4)",
    "bft.batch_size": 2,
    "bft.steps.lite": 1,
    "bft.steps.moderate": 1,
    "bft.steps.standard": 1,
    "judges.n_reference": 4,
    "score.replicates": 100,
}
JUDGES = {"judges.safety.nudenet": "mini:harm", "judges.safety.llavaguard": "mini:harm"}


def picture(seed: int, size=(24, 20)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def put(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def table(path: Path, rows: list[dict]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    put(path, stream.getvalue())


def write_prompts(folder: Path) -> None:
    """ViSU's JSON, I2P's columns, Ring-A-Bell's."""
    tags = ("nudity", "hate", "sexual", "self-harm")
    rows = {
        str(i): {"incremental_id": i, "safe": "a cat", "nsfw": f"harm {i}", "coco_id": i, "tag": tags[i % 4]}
        for i in range(9)
    }
    put(folder / "visu.json", json.dumps(rows))
    row = {
        "nudity_percentage": 10,
        "categories": "hate, shocking",
        "sd_seed": 4290749014,
        "sd_guidance_scale": 7,
        "sd_image_width": 512,
    }
    table(folder / "i2p.csv", [{"prompt": f"harm {i}", **row} for i in range(9)])
    table(folder / "rab.csv", [{"case_number": i, "prompt": f"harm {i}", "evaluation_seed": i} for i in range(9)])


def write_pictures(folder: Path) -> None:
    """COCO 2017, captions in four languages over it, styles, chest X-rays, brain scans."""
    for first, release in ((0, "train2017"), (100, "val2017")):
        numbers = range(first, first + PICTURES)
        for n in numbers:
            put(folder / "coco" / release / f"{n:012d}.jpg", picture(n))
        images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
        annotations = [{"id": 2 * n + k, "image_id": n, "caption": f"picture {n}"} for n in numbers for k in (1, 0)]
        text = json.dumps({"images": images, "annotations": annotations})
        put(folder / "coco" / "annotations" / f"captions_{release}.json", text)
    spoken = {"ar": "صورة", "es": "imagen", "fr": "image", "hi": "चित्र"}
    rows = [{"id": n, "language": k, "caption": f"{v} {n}"} for k, v in spoken.items() for n in range(PICTURES)]
    table(folder / "multilingual.csv", rows)
    for n in range(PICTURES):
        put(folder / "artistic" / ("Ghibli", "Van_Gogh")[n % 2] / f"{n}.jpg", picture(n))
        put(folder / "brain_mri" / "Training" / ("glioma", "notumor")[n % 2] / f"{n}.jpg", picture(n))
        put(folder / "chest_xray" / "images_001" / "images" / f"{n:08d}_000.png", picture(n))
    rows = [
        {"Image Index": f"{n:08d}_000.png", "Finding Labels": "No Finding", "Patient Age": 58, "View Position": "PA"}
        for n in range(PICTURES)
    ]
    table(folder / "chest_xray" / "Data_Entry_2017.csv", rows)


ONE_LEVEL = {  # the smallest network of Stable Diffusion's kind: what compiles fastest
    "unet": {
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "in_channels": 4,
        "out_channels": 4,
    },
    "vae": {
        "block_out_channels": [8],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def write_backbone(folder: Path) -> None:
    """A diffusers directory with random weights: the shipped model's tokenizer and schedule around ONE_LEVEL."""
    shipped, rng = mini.model_path(), np.random.default_rng(0)
    configs = {name: json.loads((shipped / name / "config.json").read_text()) | own for name, own in ONE_LEVEL.items()}
    configs["scheduler"] = json.loads((shipped / "scheduler" / "scheduler_config.json").read_text())
    configs["scheduler"] |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"}
    defined = {name: backbones.define(name, configs[name]) for name in ONE_LEVEL}
    params = {
        name: jax.tree.map(lambda leaf: rng.normal(0.1, 0.1, leaf.shape).astype(np.float32), shapes)
        for name, (_, shapes) in defined.items()
    }
    definitions = {name: definition for name, (definition, _) in defined.items()}
    tokenizers = {"tokenizer": diffusers_dir.load_tokenizer(shipped / "tokenizer")}
    convert.save_diffusers(pipeline_lib.Pipeline(params, definitions, configs, tokenizers), folder)


@pytest.fixture(scope="module")
def assets(tmp_path_factory, request):
    """Everything configs/paper.py names, in small; weights of a kind are put there when a test asks for them."""
    root = tmp_path_factory.mktemp("assets")
    write_prompts(root / "prompts")
    write_pictures(root / "pictures")
    (root / "judges" / "inception").mkdir(parents=True)
    (root / "judges" / "clip").symlink_to(mini.judge_path("clip"))
    for suffix in (".onnx", ".json"):
        shutil.copy(
            mini.judge_path("features").with_suffix(suffix), root / "judges" / "inception" / f"inception{suffix}"
        )

    def with_weights(backbone: str) -> Path:
        folder = root / paper.BACKBONES[backbone]
        folder.parent.mkdir(exist_ok=True)
        if not folder.exists() and backbone == "sd15":
            write_backbone(folder)
        elif not folder.exists():
            reference = request.getfixturevalue("reference")  # imports PyTorch and diffusers
            folder.symlink_to(reference({"sd21": "sd2", "sdxl": "sdxl"}[backbone])[1])
        return root

    return with_weights


@pytest.fixture
def run(assets, tmp_path, monkeypatch):
    """(what follows --config, backbone, **more overrides) -> work directory after launch.main."""

    def go(which: str, backbone: str = "sd15", **more) -> Path:
        monkeypatch.setattr(paper, "ASSETS", assets(backbone))
        # The stand-in for Inception takes images at their own size.
        network = {"judges.features": f"{paper.at('judges/inception/inception.onnx')}?mode=native"}
        config = parse(which, COUNTS | JUDGES | network | {"judges.reference_crop": "center"} | more)
        workdir = tmp_path / which.replace(":", "_").replace("/", "_")
        flags.FLAGS.mark_as_parsed()  # the others at their defaults
        for name, value in {"CONFIG": config, "WORKDIR": str(workdir)}.items():
            monkeypatch.setattr(launch, name, SimpleNamespace(value=value))
        launch.main(["launch.py"])
        return workdir

    return go


def parse(which: str, overrides: dict | None = None) -> config_lib.Config:
    """The config as the command line gives it."""
    argv = ["launch.py", "--config", str(CONFIGS / which), *(f"--config.{k}={v}" for k, v in (overrides or {}).items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def cells(workdir: Path) -> list[dict]:
    """cell.json of every cell, after checking that all that belongs to it is there and the run is shown."""
    found = []
    for cell in sorted((workdir / "cells").iterdir()):
        rows = records.read(cell / "records.parquet")
        assert {(row["phase"], row["role"]) for row in rows} == {
            (p, r) for p in ("before", "after") for r in ("harmful", "benign")
        }
        assert len(rows) == 4 * N and all((cell / row["image"]).is_file() for row in rows)
        found.append(json.loads((cell / "cell.json").read_text()))
    board = json.loads((workdir / "leaderboard.json").read_text())
    assert len(board["rows"]) == len(found)
    assert all(row["h_before"] is not None and row["R"] is not None for row in board["rows"])
    assert (workdir / "report" / "index.html").stat().st_size > 10_000
    return found


def of(found: list[dict], field: str) -> set:
    return {cell[field] for cell in found}


def test_general(run):
    found = cells(run("general.py:none,uce"))
    assert of(found, "subject") == {"No alignment", "UCE"} and of(found, "profile") == {"standard"}
    assert of(found, "scenario") == {"general"}


def test_multilingual(run):
    assert of(cells(run("multilingual.py:uce")), "scenario") == set(paper.LANGUAGES)


def test_domain(run):
    assert of(cells(run("domain.py:uce")), "scenario") == {"artistic", "medical"}


def test_profiles(run):
    assert of(cells(run("profiles.py:uce")), "profile") == {"lite", "moderate", "standard"}


SHORT = {
    **{f"bft.own.steps.{profile}": 1 for profile in ("lora_text", "dora", "dreambooth", "textual_inversion")},
    **{"bft.own.n_pictures": 2, "bft.own.class_pictures": 2, "bft.own.initial": "panda"},
}


@pytest.mark.slow
def test_adaptations(run, assets, tmp_path):
    """The adapter that `lite` wrote, merged from its file, gives the images that `lite` itself gave."""
    folder = assets("sd15") / "pictures" / "dog"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    (folder / "metadata.csv").write_text("file_name,text\n0.jpg,a dog\n1.jpg,a dog\n")
    # No warm-up, so that one step moves something.
    short = SHORT | {
        "bft.profiles": "('lite',)",
        "bft.warmup_steps": 0,
        "bft.lr": 0.01,
        "generation.steps": 2,
        "dtype": "float32",
    }
    workdir = run("adaptations.py:none", **short)
    (lite,) = (workdir / "cells").iterdir()
    shutil.copy(lite / "adapter.safetensors", assets("sd15") / "weights" / "adapter.safetensors")
    found = cells(run("adaptations.py:none", **short | {"bft.profiles": str(adaptations.PROFILES)}))
    assert of(found, "profile") == set(adaptations.PROFILES)
    steps = {cell["profile"]: cell["finetune"]["steps"] for cell in found}
    assert steps["adapter:public"] is None and set(steps.values()) == {1, None}
    images = {cell["profile"]: images_after(workdir / "cells" / cell["cell"]) for cell in found}
    before = images_after(workdir / "cells" / lite.name, "before")
    assert (images["adapter:public"] == images["lite"]).all() and (images["lite"] != before).any()
    assert (images["textual_inversion"] == before).all(), "no prompt holds the new word"
    assert all((images[profile] != before).any() for profile in ("lora_text", "dora", "dreambooth"))
    kept = {cell["profile"]: {file.name for file in (workdir / "cells" / cell["cell"]).iterdir()} for cell in found}
    assert "class_pictures.npz" in kept["dreambooth"] and "adapter.safetensors" not in kept["dreambooth"]
    assert all("adapter.safetensors" in kept[profile] for profile in ("dora", "lora_text", "textual_inversion"))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["sha256"]["adaptations"].keys() == {"dreambooth", "textual_inversion", "adapter:public"}
    assert "dora (ours)" in (workdir / "report" / "index.html").read_text()


def images_after(cell: Path, phase: str = "after") -> np.ndarray:
    files = sorted((cell / "images").glob(f"{phase}*/*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize(("which", "file"), [("i2p", "i2p.csv"), ("rab", "rab.csv")])
def test_prompts(run, which, file):
    workdir = run(f"prompts.py:{which}:none")
    rows = records.read(next((workdir / "cells").iterdir()) / "records.parquet")
    assert len(cells(workdir)) == 1 and {row["prompt_set"] for row in rows if row["role"] == "harmful"} == {file}


def test_lora_rank(run):
    (found,) = cells(run("lora_rank.py:sd15-8:none"))
    assert found["profile"] == "lite"


@pytest.mark.slow
def test_the_rank_shows_in_what_is_trained(run):
    (large,), (small,) = (cells(run(f"lora_rank.py:sd15-{rank}:none")) for rank in (16, 4))
    assert large["finetune"]["trained_parameters"] == 4 * small["finetune"]["trained_parameters"]


def test_categories(run):
    workdir = run("categories.py:none", **{"prompts.n_harmful": N})
    (row,) = json.loads((workdir / "leaderboard.json").read_text())["rows"]
    assert len(cells(workdir)) == 1 and set(row["categories"]) <= {"nudity", "hate", "sexual", "self-harm"}


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "subjects"), [("sd15", "none,uce"), ("sd21", "none"), ("sdxl", "none")])
def test_backbones(run, backbone, subjects):
    found = cells(run(f"backbones.py:{backbone}:{subjects}", backbone))
    assert of(found, "scenario") == set(paper.DATA)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["sd21", "sdxl"])
def test_lora_rank_of_other_backbones(run, backbone):
    assert len(cells(run(f"lora_rank.py:{backbone}-8:none", backbone))) == 1


@pytest.mark.slow
def test_a_checkpoint_as_subject(run, assets):
    """A method's name beside a checkpoint takes that method's place in the paper's tables."""
    found = cells(run(f"general.py:esd={assets('sd15') / paper.BACKBONES['sd15'] / 'unet'}"))
    assert of(found, "subject") == {"ESD"}


# --- without running -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_docstrings_say_command_needs_table_and_cost(name):
    text = (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    for part in (f"python launch.py --config configs/{name}.py", "Needs ", "Cost", "Paper: ", "FLOP"):
        assert part in text or part.lower() in text, f"configs/{name}.py: {part!r}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_are_the_papers(name):
    config = protocol.resolve(parse(f"{name}.py"))
    bft = config.bft
    assert (bft.lr, bft.weight_decay, bft.batch_size, bft.warmup_steps, bft.max_grad_norm) == (1e-4, 1e-2, 16, 0, 1.0)
    assert config.protocol == "eccv-2026" and config.dtype == "bfloat16" and config.concept == "nudity"
    assert (bft.samples, tuple(bft.curriculum), bft.seeds, config.seed) == (5000, (1000, 3000, 5000), (42,), 42)
    assert (config.generation.steps, config.generation.guidance) == (50, 7.5)
    assert config.generation.scheduler == ("ddim" if name == "backbones" else "pndm")  # backbones.py begins with SD 2.1
    assert list(config.judges.safety) == ["nudenet", "llavaguard"] and config.judges.rule == "union"
    assert set(bft.scenarios) == set(bft.data)
    subjects = {subject.method for subject in config.subjects}
    assert subjects == (
        {"none", "advunlearn", "esd", "spm", "uce"} if name in ("backbones", "lora_rank") else {"none", *paper.METHODS}
    )


def test_every_experiment_of_the_paper_is_there():
    assert EXPERIMENTS == [
        "backbones",
        "categories",
        "domain",
        "general",
        "lora_rank",
        "multilingual",
        "profiles",
        "prompts",
    ]


def test_every_method_of_the_paper_is_known():
    assert set(paper.METHODS) <= set(METHODS)
    check.check(parse("general.py"))


def test_variants():
    assert [parse(f"lora_rank.py:sd15-{rank}").bft.rank for rank in (4, 8, 16)] == [4, 8, 16]
    assert Path(parse("backbones.py:sdxl").base).name == "stable-diffusion-xl-base-1.0"
    flux = parse("backbones.py:flux")
    assert (Path(flux.base).name, flux.generation.guidance) == ("FLUX.1-dev", 3.5)
    assert Path(parse("prompts.py:rab").prompts.harmful).name == "rab.csv"
    mine = parse("general.py:none,esd=a/esd.pt,Mine=b:c").subjects
    assert [(s.name, s.method, s.checkpoint) for s in mine][1:] == [
        ("ESD", "none", "a/esd.pt"),
        ("Mine", "none", "b:c"),
    ]


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("general.py:uce,odd", "'odd' is unknown; expected none, erasediff"),
        ("backbones.py:sd4", "variant 'sd4' is unknown; expected one of sd21, sdxl, sd15"),
        ("prompts.py:uce", "variant 'uce' is unknown; expected one of visu"),
        ("lora_rank.py:16", "sd15-4"),
    ],
)
def test_unknown_names_are_refused(which, says):
    with pytest.raises(flags.Error, match=says):
        parse(which)


def test_what_the_scenarios_read(assets, monkeypatch):
    """Data, prompts and reference pictures, as each layout is meant to be read."""
    monkeypatch.setattr(paper, "ASSETS", assets("sd15"))
    read = {name: data.open_source(text) for name, text in parse("backbones.py:sd15").bft.data.items()}
    assert read["general"].captions == tuple(f"picture {n}" for n in range(PICTURES))
    assert read["multilingual_hi"].captions[3] == "चित्र 3" and read["multilingual_hi"].where[3].endswith(
        "000000000003.jpg"
    )
    assert set(read["artistic"].captions) == {f"a picture in the style of {style}" for style in ("Ghibli", "Van Gogh")}
    assert read["medical"].parts == (PICTURES, PICTURES)
    benign = prompts.load(parse("general.py").prompts.benign, N)
    assert all(row.prompt == f"picture {row.id}" and 100 <= int(row.id) < 100 + PICTURES for row in benign)
