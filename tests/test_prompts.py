"""Prompt files of published work, read unchanged: their headers, their quirks, and clear errors."""

import json
import random

import pytest

from spqr_jax import prompts
from spqr_jax.prompts import Prompt

I2P = (
    ",prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number\n"
    '0,"a ""quoted"" thing\nover two lines","violence, hate",0,10,0,5,0,0.1,url,4290749014,7,512,512,SD,17\n'
    "1,,sexual,0,10,0,5,0,0.1,url,12,7.5,512,512,SD,2260\n"
)


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


def test_i2p_layout(tmp_path):
    first, empty = prompts.read_file(write(tmp_path, "i2p.csv", I2P))
    assert first == Prompt("17", 'a "quoted" thing\nover two lines', "violence, hate", "en", 4290749014, 7.0)
    assert empty.prompt == "" and empty.id == "2260" and empty.guidance == 7.5


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("und.csv", "Unnamed: 0,case_number,prompt,evaluation_seed\n0,3,x,9\n", Prompt("3", "x", seed=9)),
        ("mace.csv", ",type,prompt,evaluation_seed\n0,art,x,9\n", Prompt("0", "x", "art", seed=9)),
        ("coco.csv", "image_id,source,prompt,evaluation_seed\n42.0,coco,x,9.0\n", Prompt("42", "x", seed=9)),
        ("rece.csv", "sensitive prompt,normal prompt\nx,y\n", Prompt("0", "x")),
        ("bom.csv", "\ufeffprompt\nx\n", Prompt("0", "x")),
        ("tab.tsv", "prompt\tlang\nx\thi\n", Prompt("0", "x", language="hi")),
        ("lines.txt", "x\n\n", Prompt("0", "x")),
        ("rows.jsonl", '{"prompt": "x", "tag": "blood "}\n', Prompt("0", "x", "blood")),
        (
            "captions_val2017.json",
            json.dumps(
                {
                    "images": [{"id": 42, "file_name": "000000000042.jpg"}],
                    "annotations": [
                        {"id": 9, "image_id": 42, "caption": "y"},
                        {"id": 8, "image_id": 42, "caption": "x\n"},
                    ],
                }
            ),
            Prompt("42", "x"),
        ),
        ("visu.json", json.dumps({"7": {"incremental_id": 7, "nsfw": "x", "tag": "blood"}}), Prompt("0", "x", "blood")),
    ],
)
def test_layouts(tmp_path, name, text, expected):
    assert prompts.read_file(write(tmp_path, name, text)) == [expected]


def test_repeated_ids_fall_back_to_rows(tmp_path):
    rows = prompts.read_file(write(tmp_path, "a.csv", "case_number,prompt\n1,x\n1,y\n"))
    assert [row.id for row in rows] == ["0", "1"]


def test_drawing_depends_on_the_seed_and_keeps_file_order(tmp_path):
    path = write(tmp_path, "many.txt", "\n".join(f"prompt {i}" for i in range(100)))
    drawn = [prompts.load(str(path), 20, seed=seed) for seed in (42, 42, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [int(p.id) for p in drawn[0]] == sorted(int(p.id) for p in drawn[0])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "picture\nx\n", "columns"),
        ("a.csv", "", "no rows"),
        ("a.xlsx", "x", "extension"),
        ("a.csv", "prompt,seed\nx,-1\n", "row 0"),
        ("a.csv", "prompt,seed\nx,4294967296\n", "4294967296"),
    ],
)
def test_bad_files(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        prompts.read_file(write(tmp_path, name, text))


def test_missing_file_encoding_and_count(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prompts.load("/nowhere.csv", 1)
    with pytest.raises(ValueError, match="UTF-8"):
        prompts.read_file(write(tmp_path, "latin.csv", "prompt\nné\n", encoding="latin-1"))
    with pytest.raises(ValueError, match="holds 1 prompts"):
        prompts.load(str(write(tmp_path, "one.txt", "x")), 2)


def visu(folder):
    """A file laid out as ViSU's test split: 5,000 rows, 511 of them with the tags "sexual" and "nudity"."""
    tags = ["sexual", "nudity", *("violence", "theft", "hate", "drugs") * 2]
    rows = []
    for i in range(5000):
        tagged = i % 10 in (0, 1) and i < 2551
        rows.append({"incremental_id": i, "safe": f"safe {i}", "nsfw": f"text {i}", "coco_id": i, "prompt_id": 0})
        rows[-1]["tag"] = tags[i % 10] if tagged else tags[2 + i % 8]
    assert sum(row["tag"] in ("sexual", "nudity") for row in rows) == 511
    path = folder / "ViSU-Text_test.json"
    path.write_text(json.dumps(rows))
    return path, rows


def test_the_official_draw_of_visu_is_reproduced(tmp_path):
    path, rows = visu(tmp_path)
    tagged = [row["nsfw"] for row in rows if "nsfw" in row and row.get("tag") in ["sexual", "nudity"]]
    random.seed(42)  # as the official scripts write it
    expected = random.sample(tagged, min(500, len(tagged)))
    drawn = prompts.load(f"visu:{path}?tag=sexual,nudity", 500, seed=42)
    assert [prompt.prompt for prompt in drawn] == expected
    assert {prompt.category for prompt in drawn} == {"sexual", "nudity"}
    assert drawn == prompts.load(f"{path}?category=nudity,sexual", 500, seed=42)
    assert {p.id for p in drawn} == {str(rows.index(row)) for row in rows if row["nsfw"] in set(expected)}


def test_selections_of_i2p(tmp_path):
    header = "case_number,prompt,categories,nudity_percentage\n"
    lines = ['0,a,"sexual, violence",10', "1,b,violence,9.5", "2,c,sexual,80", "3,d,hate,"]
    path = write(tmp_path, "i2p.csv", header + "\n".join(lines))

    def ids(selection, n):
        return sorted(prompt.id for prompt in prompts.load(f"{path}?{selection}", n))

    assert ids("nudity_percentage>=10", 2) == ["0", "2"]
    assert ids("nudity_percentage<10", 1) == ["1"]
    assert ids("category=sexual", 2) == ["0", "2"]
    assert ids("category=violence", 2) == ["0", "1"], "a prompt with two categories is in each of them"
    assert ids("category=sexual&nudity_percentage>10", 1) == ["2"]
    assert len(prompts.load(f"{path}?n=2", 4)) == 2


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ("tags=sexual", "no column 'tags'.*case_number, nudity_percentage, prompt"),
        ("nudity_percentage>=ten", "'ten'.*no number"),
        ("sexual", "'sexual' is no condition"),
        ("n=0", "at least 1"),
        ("n=many", "at least 1"),
        ("nudity_percentage>=50", "holds 1 prompts, the config asks for 2"),
    ],
)
def test_bad_selections_are_named(tmp_path, selection, says):
    path = write(tmp_path, "i2p.csv", "case_number,prompt,nudity_percentage\n1,x,10\n2,y,80\n")
    with pytest.raises(ValueError, match=says):
        prompts.load(f"{path}?{selection}", 2)
