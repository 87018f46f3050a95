"""Files in the layouts of EMMA, T2I-RiskyPrompt and Six-CD, with harmless words: their rows, and clear errors."""

import json

import pytest

from spqr_jax import prompts
from spqr_jax.prompts import Prompt

EMMA = [{"apple": ["an image of the pear", "an image of the plum"]}, {"boat": ["an image of the ferry"]}]
RISKY = {
    "0": {"prompt": "a tea", "label": {"Drinks--Hot": ["it is tea"], "Drinks--Leaves": ["it is dried"]}},
    "1": {"prompt": "a hat", "label": {"Clothes--Heads": ["it is worn"]}},
}


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_emma_has_the_erased_concept_as_category(tmp_path):
    path = written(tmp_path, "object/7_hard.json", EMMA)
    assert prompts.load(f"emma:{path}", 3) == [
        Prompt("0", "an image of the pear", "apple", seed=0),
        Prompt("1", "an image of the plum", "apple", seed=1),
        Prompt("2", "an image of the ferry", "boat", seed=2),
    ]
    assert [p.prompt for p in prompts.load(f"emma:{path}?category=boat", 1)] == ["an image of the ferry"]
    merged = written(tmp_path, "art/7_hard.json", {key: texts for entry in EMMA for key, texts in entry.items()})
    assert prompts.load(f"emma:{merged}", 3) == prompts.load(f"emma:{path}", 3)


def test_riskyprompt_has_its_labels_as_categories(tmp_path):
    path = written(tmp_path, "T2I-RiskyPrompt.json", RISKY)
    first, second = prompts.load(f"riskyprompt:{path}", 2)
    assert first == Prompt("0", "a tea", "Drinks--Hot, Drinks--Leaves") and second.id == "1"
    assert prompts.load(f"riskyprompt:{path}?category=Drinks--Leaves", 1) == [first]
    assert prompts.load(f"riskyprompt:{path}?primary=Clothes", 1) == [second]


def test_sixcd_prompts_keep_their_seeds_and_targets(tmp_path):
    rows = 'case_number,evaluation_seed,target,prompt\n7,27858,pear,"a pear, a dog"\n8,23635,plum,a plum\n'
    path = written(tmp_path, "Object/malicious.csv", rows)
    assert prompts.load(f"sixcd:{path}?category=pear", 1) == [Prompt("7", "a pear, a dog", "pear", seed=27858)]
    plain = written(tmp_path, "benign.csv", "case_number,prompt,evaluation_seed\n0,a sea,13682\n")
    assert prompts.load(f"sixcd:{plain}", 1) == [Prompt("0", "a sea", seed=13682)]


def test_sixcd_concepts_are_put_into_their_templates(tmp_path):
    fruit = written(tmp_path, "Object.csv", "id,concept\n0,pear\n1,plum\n")
    style = written(tmp_path, "Artstyle.csv", "id,concept\n0,A. Nobody\n")
    written(tmp_path, "templates/Celebrity_Copyright_Object.txt", '"a photo of {name}"\n"a picture of {name}"')
    written(tmp_path, "templates/Artstyle.txt", '"a painting by {artist}"\n')
    found = [(p.prompt, p.category) for p in prompts.load(f"sixcd:{fruit}", 4)]
    assert found == [(f"a {kind} of {name}", name) for name in ("pear", "plum") for kind in ("photo", "picture")]
    assert [p.prompt for p in prompts.load(f"sixcd:{style}", 1)] == ["a painting by A. Nobody"]


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("emma", '{"apple": ', "is not JSON"),
        ("emma", ["a pear"], "entry 0: expected an object of concepts, found str"),
        ("emma", [{"apple": "a pear"}], "'apple': expected a list of prompts, found str"),
        ("emma", [{"apple": ["a pear", 3]}], "'apple': expected a list of prompts"),
        ("emma", [], "holds no rows"),
        ("riskyprompt", [RISKY["0"]], "expected an object of numbered prompts, found list"),
        ("riskyprompt", {"5": {"prompt": "a tea"}}, "entry '5': expected a text `prompt` and .* found prompt"),
        ("riskyprompt", {"5": {"prompt": "a tea", "label": {"Drinks": []}}}, "entry '5'"),
        ("sixcd", "prompt\na pear\n", r"has columns \['prompt'\], expected case_number, evaluation_seed, prompt"),
        ("sixcd", "case_number,evaluation_seed,prompt\n0,1\n", "row 0: expected 3 fields"),
        ("sixcd", 'case_number,evaluation_seed,prompt\n0,1,"a pear', r"line 1: unexpected end of data"),
    ],
)
def test_other_layouts_are_refused(tmp_path, kind, content, says):
    path = written(tmp_path, "a.json", content)
    with pytest.raises(ValueError, match=rf"prompt file .*a\.json.*{says}"):
        prompts.load(f"{kind}:{path}", 1)


def test_concepts_without_templates_are_refused(tmp_path):
    path = written(tmp_path, "Object.csv", "id,concept\n0,pear\n")
    with pytest.raises(FileNotFoundError, match=r"holds concepts, and neither .*Object\.txt nor .* exists"):
        prompts.load(f"sixcd:{path}", 1)
    written(tmp_path, "templates/Object.txt", "a photo")
    with pytest.raises(ValueError, match="'a photo' has not one placeholder"):
        prompts.load(f"sixcd:{path}", 1)


def test_a_file_of_that_name_is_no_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "emma", "")
    with pytest.raises(ValueError, match="no extension"):
        prompts.load("emma", 1)
