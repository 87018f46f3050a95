"""Safety judges of installed distributions, and of one's own by their dotted path."""

import json

import numpy as np
import pytest

from judges import opening, plugins
from judges.__main__ import main
from judges.opening import JUDGES, Judge, open_safety
from judges.session import JudgeError

GROUP = "spqr_jax.judges"
IMAGES = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (20, 230)])
DARK = '''"""Calls dark images unsafe."""
from judges.answers import SAFE, UNSAFE, LabelRecord

class Dark:
    """One number."""
    def __init__(self, threshold):
        self.identity = {"judge": "dark", "options": {"threshold": threshold}}
        self.threshold = threshold

    @classmethod
    def open(cls, threshold="0.5", *, providers=None, strict: bool = False):
        return cls(float(threshold) / (2 if strict else 1))

    def __call__(self, images):
        scores = 1 - images.mean(axis=(1, 2, 3)) / 255
        return [LabelRecord(UNSAFE if s >= self.threshold else SAFE, float(s), "", {}) for s in scores]
'''


def verdicts(judge):
    return [record.verdict for record in judge(IMAGES)]


@pytest.mark.parametrize("name", ["dark", "our_lab.Dark"])
def test_it_opens_by_name_and_by_dotted_path(installed, name):
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark"}}, {"our_lab.py": DARK}, "0.2")
    judge = open_safety(f"{name}:0.05?strict=true")
    assert isinstance(judge, Judge) and verdicts(judge) == ["unsafe", "unsafe"]
    assert judge.identity["options"] == {"threshold": 0.025}
    start = "our-lab 0.2 our_lab:Dark sha256:" if name == "dark" else f"{name} sha256:"
    assert judge.identity["plugin"].startswith(start)
    assert verdicts(open_safety(name)) == ["unsafe", "safe"]
    with pytest.raises(JudgeError, match="no option 'stricct'; its options are strict"):
        open_safety(f"{name}?stricct=true")


def test_a_changed_file_changes_the_identity(installed):
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark"}}, {"our_lab.py": DARK})
    first = open_safety("dark").identity
    assert open_safety("dark").identity == first
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark"}}, {"our_lab.py": DARK + "# changed\n"})
    assert open_safety("dark").identity != first


def test_the_name_of_a_built_in_judge_cannot_be_taken(installed, caplog):
    installed("a-thief", {GROUP: {"q16": "a_thief:x", "nudenet": "a_thief:x"}}, {"a_thief.py": "1 / 0"})
    plugins.warn_if_refused.cache_clear()
    with pytest.raises(JudgeError, match=r"no such|no .*python -m convert judges"):
        open_safety("q16:nowhere")
    assert "'q16' of a-thief 1.0 (a_thief:x) is refused" in caplog.text


def test_two_distributions_and_a_broken_one_are_named(installed):
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark", "gone": "our_lab:Gone"}}, {"our_lab.py": DARK})
    installed("their-lab", {GROUP: {"dark": "their_lab:Dark"}}, {"their_lab.py": DARK}, "2.0")
    with pytest.raises(JudgeError, match=r"'dark' is offered by their-lab 2\.0 .* and our-lab 1\.0 "):
        open_safety("dark")
    with pytest.raises(
        JudgeError, match=r"entry point gone = our_lab:Gone of our-lab 1\.0 cannot be loaded \(AttributeE"
    ):
        open_safety("gone")
    with pytest.raises(JudgeError, match=r"judge 'no_lab\.Dark' cannot be imported .*; set PYTHONPATH"):
        open_safety("no_lab.Dark")
    with pytest.raises(JudgeError, match=r"no such judge and no such file; expected .*, gone, the dotted path"):
        open_safety("drak")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Dark = 3", "our_lab:Dark has no open"),
        ("def Dark(place): pass", "does not take `providers`"),
        ("def Dark(*, providers): pass", "takes no PLACE"),
        ("def Dark(place='', *, providers): return 3", "opened as int; expected a callable"),
        (
            "def Dark(place='', *, providers): return {}['x']",
            r"our_lab:Dark of our-lab 1\.0 does not open \(KeyError: 'x'\)",
        ),
        (DARK.replace('"judge": "dark"', '"judge": cls'), "does not open"),
        (DARK.replace('"judge": "dark"', '"judge": self'), "its identity is no JSON"),
    ],
)
def test_one_of_another_form_is_refused(installed, text, says):
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark"}}, {"our_lab.py": text})
    with pytest.raises(JudgeError, match=says) as error:
        open_safety("dark")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("records[:1]", "answered 1 times about 2 images"),
        ("[r._replace(verdict='fine') for r in records]", "said 'fine'"),
    ],
)
def test_its_answers_are_checked(installed, answer, says):
    text = DARK.replace("return [Label", "records = [Label") + f"        return {answer}\n"
    installed("our-lab", {GROUP: {"dark": "our_lab:Dark"}}, {"our_lab.py": text})
    with pytest.raises(JudgeError, match=says):
        open_safety("dark")(IMAGES)


def test_the_list(installed, capsys):
    folder = installed("our-lab", {GROUP: {"dark": "our_lab:Dark", "gone": "gone:x"}}, {"our_lab.py": DARK})
    assert main(["--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(listed) == {*JUDGES, "dark", "gone"}
    assert listed["nudenet:v2"]["options"]["threshold"] == "0.7" and listed["q16"]["origin"] == "built in"
    assert listed["dark"]["options"] == {"strict": "False"} and listed["dark"]["about"] == "One number."
    assert listed["dark"]["file"] == str(folder / "our_lab.py")
    assert "ModuleNotFoundError" in listed["gone"]["fault"]
    assert main(["our_lab.Dark"]) == 0 and main(["no_judge"]) == 1
    assert "no such judge; expected one of nudenet," in capsys.readouterr().out


def test_place_of_names_it_whole():
    assert opening.place_of("dark:0.7?strict=true") == "dark:0.7"
