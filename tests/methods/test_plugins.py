"""Methods that installed distributions offer: found by name, listed, identified, and never in the way of others."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from judges import plugins
from spqr_jax import methods
from spqr_jax.config import Config, Subject
from spqr_jax.methods import METHODS
from spqr_jax.methods.__main__ import main
from spqr_jax.run import check, identity, protocol
from spqr_jax.run.cells import plan
from spqr_jax.run.identity import Inputs
from tests.distributions import install

ROOT = Path(__file__).parents[2]
GROUP = "spqr_jax.methods"
ERASE = '''"""Erase by shrinking."""
from spqr_jax.methods import Method

def erase(pipeline, concept, *, seed=0, strength=0.5):
    """Multiply by 1 - strength."""
    return pipeline

METHOD = Method("other", "Our Erasure", erase, backbones=("sd",))
'''
BROKEN = 'raise RuntimeError("no such\\n  accelerator")\n'


def ids(name):
    """Ids of weights and of a cell, and the entry of the manifest, of a run with one subject of this method."""
    config = protocol.resolve(Config(subjects=(Subject("Mine", name),)))
    check.check(config)
    inputs = Inputs("backbone", {}, {"general": "data"}, {}, methods=identity.method_sources(config.subjects))
    subjects, cells = plan(config, Path("run"), inputs)
    return subjects[0].weights.name, cells[0].id, inputs.methods


def test_it_is_found_by_the_name_of_its_entry_point(installed):
    folder = installed("our-lab", {GROUP: {"erase": "our_lab:METHOD"}}, {"our_lab.py": ERASE}, "0.3")
    found = methods.find("erase")
    assert (found.name, found.title, found.backbones) == ("erase", "Our Erasure", ("sd",))
    sha256 = hashlib.sha256((folder / "our_lab.py").read_bytes()).hexdigest()
    assert found.source == f"our-lab 0.3 our_lab:METHOD sha256:{sha256}"
    assert ids("erase")[2] == {"erase": found.source}
    assert methods.find("our_lab.erase").title == "Our Erasure"  # the dotted path works too


@pytest.mark.parametrize("value", ["our_lab", "our_lab:erase", "our_lab:METHOD"])
def test_it_may_be_a_module_a_function_or_a_record(installed, value):
    installed("our-lab", {GROUP: {"erase": value}}, {"our_lab.py": ERASE})
    assert methods.find("erase").title == "Our Erasure" and methods.options(methods.find("erase")) == (
        "seed",
        "strength",
    )


def test_every_file_of_its_package_and_its_version_are_part_of_every_id(installed):
    offers = {GROUP: {"erase": "our_lab.methods.erase:METHOD"}}
    files = {
        "our_lab/__init__.py": "",
        "our_lab/methods/__init__.py": "",
        "our_lab/methods/erase.py": ERASE,
        "our_lab/words.json": "[]",
    }
    seen = [ids("erase") for _ in (installed("our-lab", offers, files),)]
    for name, text in (("our_lab/words.json", '["gun"]'), ("our_lab/other.py", "x = 1"), ("our_lab/__init__.py", "#")):
        installed("our-lab", offers, files | {name: text})
        seen.append(ids("erase"))
    installed("our-lab", offers, files, "1.1")
    seen.append(ids("erase"))
    installed("our-lab", offers, files | {"our_lab/__pycache__/x.pyc": "x", "our_lab/.hidden": "x", "beside.py": "x"})
    assert ids("erase") == seen[0]
    for part in range(2):
        assert len({one[part] for one in seen}) == len(seen)


def test_the_name_of_a_built_in_method_cannot_be_taken(installed, caplog, capsys):
    installed("a-thief", {GROUP: {"uce": "a_thief:METHOD"}}, {"a_thief.py": BROKEN})
    plugins.warn_if_refused.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert methods.find("uce") is METHODS["uce"]
    assert "'uce' of a-thief 1.0 (a_thief:METHOD) is refused: that is the name of a built-in one" in caplog.text
    assert main(["list"]) == 0
    assert "cannot be used: 'uce' of a-thief 1.0 (a_thief:METHOD) is refused" in " ".join(
        capsys.readouterr().out.split()
    )
    assert "a_thief" not in sys.modules


def test_one_name_of_two_distributions_is_an_error_that_names_both(installed):
    installed("our-lab", {GROUP: {"erase": "our_lab:METHOD", "other": "our_lab:METHOD"}}, {"our_lab.py": ERASE})
    installed("their-lab", {GROUP: {"erase": "their_lab:METHOD"}}, {"their_lab.py": ERASE}, "2.0")
    expected = (
        r"method 'erase' is offered by their-lab 2\.0 \(their_lab:METHOD\) and our-lab 1\.0 \(our_lab:METHOD\); un"
    )
    with pytest.raises(ValueError, match=expected):
        methods.find("erase")
    assert methods.find("other").name == "other" and methods.find("their_lab.METHOD").title == "Our Erasure"


@pytest.mark.parametrize(
    ("value", "text", "says"),
    [
        ("our_lab:METHOD", BROKEN, "RuntimeError: no such accelerator"),
        ("our_lab:METHOD", "import sys\nsys.exit(3)", "SystemExit: 3"),
        ("our_lab:MISSING", ERASE, "AttributeError: module 'our_lab' has no attribute 'MISSING'"),
        ("no_lab:METHOD", ERASE, "ModuleNotFoundError: No module named 'no_lab'"),
    ],
)
def test_a_broken_one_is_told_by_distribution_entry_point_and_error(installed, value, text, says):
    installed("our-lab", {GROUP: {"erase": value}}, {"our_lab.py": text})
    with pytest.raises(ValueError) as error:
        check.check(Config(subjects=(Subject("Mine", "erase"),)))
    message = str(error.value)
    assert f"config.subjects[Mine]: method 'erase': the entry point erase = {value} of our-lab 1.0 cannot" in message
    assert says in message and "\n" not in message
    check.check(Config(subjects=(Subject("Mine", "uce"),)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("METHOD = 3", "method 'erase' is of type int; expected a function align"),
        ("def METHOD(pipeline): pass", "method 'erase' has not the form"),
    ],
)
def test_something_of_another_form_is_refused(installed, text, says):
    installed("our-lab", {GROUP: {"erase": "our_lab:METHOD"}}, {"our_lab.py": text})
    with pytest.raises(ValueError, match=says):
        methods.find("erase")


def test_an_unknown_name_is_refused_with_the_plug_ins_too(installed):
    installed("our-lab", {GROUP: {"erase": "our_lab:METHOD"}}, {"our_lab.py": ERASE})
    with pytest.raises(
        ValueError, match=r"method 'eraze' is unknown; expected one of .*, safety_dpo, .*erase, or the dotted"
    ):
        methods.find("eraze")


def test_nothing_is_imported_before_it_is_named(tmp_path):
    """In a fresh interpreter: rooms are imported, a built-in method is found, and a broken plug-in is not touched."""
    groups = {group: {"broken": "broken_lab:thing"} for group in (plugins.METHODS, plugins.JUDGES, plugins.DATA)}
    folder = install(tmp_path, "broken-lab", groups, {"broken_lab.py": BROKEN})
    code = (
        "import spqr_jax.methods, judges.opening, spqr_jax.data, sys; spqr_jax.methods.find('uce'); "
        "assert spqr_jax.data.places('broken:x'); assert 'broken_lab' not in sys.modules; "
        "spqr_jax.methods.find('broken')"
    )
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "the entry point broken = broken_lab:thing of broken-lab 1.0 cannot be loaded" in done.stderr


# --- the list


def test_the_list_has_origins_options_and_defaults(installed, capsys):
    folder = installed("our-lab", {GROUP: {"erase": "our_lab:METHOD", "gone": "gone:x"}}, {"our_lab.py": ERASE})
    assert main(["list", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(listed) == {*METHODS, "erase", "gone"}
    assert listed["uce"]["origin"] == "built in" and listed["uce"]["options"]["ridge"] == "0.5"
    assert listed["uce"]["about"].startswith("UCE, Unified Concept Editing")
    assert listed["uce"]["file"] == str(ROOT / "spqr_jax" / "methods" / "uce.py")
    erase = listed["erase"]
    assert erase["origin"].startswith("our-lab 1.0 our_lab:METHOD sha256:") and erase["about"] == "Erase by shrinking."
    assert erase["options"] == {"seed": "0", "strength": "0.5"} and erase["file"] == str(folder / "our_lab.py")
    assert listed["gone"]["fault"] and listed["gone"]["origin"] == "our-lab 1.0 gone:x"


def test_things_may_be_listed_by_name(installed, capsys):
    installed("our-lab", {}, {"our_lab.py": ERASE})
    assert main(["our_lab.erase", "esd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("our_lab.erase  (our_lab.erase sha256:") and "esd  (built in)" in lines
    assert main(["list", "nothing"]) == 1
    assert "cannot be used: method 'nothing' is unknown" in capsys.readouterr().out


# --- the check; what it finds is tested in tests/contract


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_method"], "error: method 'no_method' is unknown"),
        (["uce", "--backbone", "sd9"], "error: --backbone: 'sd9' is unknown; expected some of sd, sdxl, sd3"),
        (
            ["uce", "--options", "rigde=1"],
            "error: --options: 'rigde' is unknown; expected some of seed, variant, ridge",
        ),
        (["uce", "--options", "ridge"], "error: --options ridge: expected OPTION=VALUE"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments, says):
    assert main(["check", *arguments]) == 1
    assert capsys.readouterr().err.startswith(says)


def test_the_command_prints_a_line_for_each_check(installed, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    assert main(["check", "uce", "--backbone", "sd", "--options", "ridge=1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "uce: UCE (built in)" and lines[-1] == "uce keeps to the contract."
    assert all(line.startswith("ok   ") for line in lines[1:-1]) and any(
        "it runs (ridge=1.5; " in line for line in lines
    )
    installed("our-lab", {GROUP: {"erase": "our_lab:METHOD"}}, {"our_lab.py": ERASE})
    assert main(["check", "erase"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert "FAIL sd    it changes something: no weight has changed and nothing is attached" in failed
    assert any(line.startswith("FAIL sdxl  it refuses a backbone that it does not name: it aligned") for line in failed)
    assert lines[-1] == f"{len(failed)} of {len(lines) - 2} checks failed."
    assert main(["check", "erase", "--backbone", "sd", "--json"]) == 1
    assert {finding["backbone"] for finding in json.loads(capsys.readouterr().out)} == {"", "sd"}
