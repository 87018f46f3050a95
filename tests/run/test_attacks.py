"""Attacks in a run: one subject of the emoji world, attacked before and after fine-tuning, from config to report."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spqr_jax import attacks as attacks_lib
from spqr_jax import config as config_lib
from spqr_jax import report
from spqr_jax.config import BFT, Attack, Config, Generation, Judges, PerProfile, Prompts, Score, Subject
from spqr_jax.files import records
from spqr_jax.run import check, command, dry_run, opening, protocol, stages
from spqr_jax.run.command import Asked
from spqr_jax.run.stages import found as found_lib
from spqr_jax.submission import bundle, pack
from tests.contract import small
from tests.run import trial_attacks

BUDGET = {"steps": 2, "images": 4, "batch_size": 2, "image_steps": 4, "image_guidance": 4.0}
INVERSION = Attack("Inversion", "inversion", BUDGET, prompts=2)
TRANSFERRED = Attack("Transferred", "inversion", BUDGET, transfer=True, prompts=2)


def config_of(*attacks: Attack, **fields) -> Config:
    defaults = {
        "subjects": (Subject("UCE", "uce"),),
        "attacks": attacks,
        "prompts": Prompts(n_harmful=4, n_benign=4),
        "generation": Generation(steps=2, guidance=4.0, scheduler="dpmpp", batch_size=4),
        "bft": BFT(
            profiles=("moderate",),
            samples=8,
            curriculum=(4, 8),
            batch_size=4,
            steps=PerProfile(2, 2, 2),
            warmup_steps=1,
        ),
        "judges": Judges(n_reference=16),
        "score": Score(replicates=100),
    }
    return Config(**(defaults | fields))


def run(config: Config, workdir: Path, names=stages.NAMES) -> int:
    return command.carry_out(config, workdir, Asked(set(names)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("attacks") / "run"
    assert run(config_of(INVERSION, TRANSFERRED), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The same run without attacks."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    assert run(config_of(), workdir) == 0
    return workdir


def folders(workdir: Path) -> dict[tuple[str, str], Path]:
    """(attack, phase) -> folder of every complete attempt."""
    summaries = {path.parent: json.loads(path.read_text()) for path in workdir.glob("attacks/*/attack.json")}
    return {(said["attack"], said["phase"]): folder for folder, said in summaries.items()}


def content(workdir: Path) -> dict[str, bytes]:
    """All files that hold results, but for those that hold times."""
    return {
        file.relative_to(workdir).as_posix(): file.read_bytes()
        for file in sorted(workdir.rglob("*"))
        if file.suffix in (".png", ".parquet", ".npz") or file.name in ("leaderboard.json", "attacks.json")
    }


def test_records_are_like_any_other_and_hold_the_given_prompts(finished):
    found = folders(finished)
    assert set(found) == {(name, phase) for name in ("Inversion", "Transferred") for phase in ("before", "after")}
    (cell,) = (finished / "cells").iterdir()
    given = [row for row in records.read(cell / "records.parquet") if row["role"] == "harmful"]
    for (name, phase), folder in found.items():
        rows = records.read(folder / "records.parquet")
        before = [row for row in given if row["phase"] == phase][:2]
        same = ("prompt_id", "prompt", "role", "k", "category", "image_seed", "phase")
        assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in before]
        assert {row["prompt_set"] for row in rows} == {f"mini:harmful@{name}"}
        assert {row["cell"] for row in rows} == {"" if phase == "before" else cell.name}
        assert {row["profile"] for row in rows} == {"" if phase == "before" else "moderate"}
        assert all((folder / row["image"]).is_file() and row["verdict"] in ("safe", "unsafe") for row in rows)


def test_attacks_read_the_model_that_they_are_made_on(finished):
    """The word is another one after fine-tuning; a transferred one is found once and drawn by both models."""
    found = folders(finished)
    before, after = (found_lib.read(found["Inversion", phase] / "found.npz") for phase in ("before", "after"))
    assert before.prompts == after.prompts and before.words.keys() == after.words.keys()
    assert all((before.words[word] != after.words[word]).any() for word in before.words)
    assert not any((found["Transferred", phase] / "found.npz").exists() for phase in ("before", "after"))
    (shared,) = finished.glob("attacks/transferred-unaligned-*/found.npz")
    assert found_lib.read(shared).words.keys() == before.words.keys()


def test_the_scores_of_attacks_stand_apart(finished, plain):
    """Cells, ids and the leaderboard are those of the run without attacks, to the byte."""
    ours, theirs = content(finished), content(plain)
    own = ("attacks", "report/figures/attack", "report/tables/attack")
    assert {name: value for name, value in ours.items() if not name.startswith(own)} == theirs
    assert len(theirs) > 20 and not (plain / "attacks.json").exists()
    rows = json.loads(ours["attacks.json"])["rows"]
    assert [row["attack"] for row in rows] == ["no attack", "Inversion", "Transferred", "any attack"]
    assert all(row["n"] == 2 and row["asr_before"] is not None and row["R"] is not None for row in rows)


def test_what_was_found_is_in_no_report_and_no_bundle(finished, plain, tmp_path):
    learned = found_lib.read(folders(finished)["Inversion", "before"] / "found.npz")
    secrets = [prompt.encode() for prompt in learned.prompts] + [b"<word-", b"&lt;word-", b"\\u003cword-"]
    report.write(finished, out=tmp_path / "report")
    made = pack.of_run(finished)
    bundle.write(made, tmp_path / "bundle")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "attacks.md" for file in files) and any(file.name == "submission.json" for file in files)
    assert not [file for file in files for secret in secrets if secret in file.read_bytes()]
    other = pack.of_run(plain)
    assert made.manifest == other.manifest and made.leaderboard["rows"] == other.leaderboard["rows"]


def test_the_same_command_does_only_what_is_missing(finished, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    whole, found = content(workdir), folders(workdir)
    attacked = found["Inversion", "after"]
    for file in (attacked / "found.npz", attacked / "attack.json", found["Transferred", "before"] / "attack.json"):
        file.unlink()
    lost = next(found["Transferred", "before"].rglob("*.png"))
    lost.unlink()
    damaged = next(workdir.glob("attacks/transferred-unaligned-*/found.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    kept = {path: path.stat().st_mtime_ns for path in found["Inversion", "before"].rglob("*") if path.is_file()}
    assert run(config_of(INVERSION, TRANSFERRED), workdir) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(workdir) == whole
    assert len(list(damaged.parent.glob("found.npz.damaged-*"))) == 1


def test_a_dry_run_counts_attacks(finished, tmp_path, capsys):
    config, workdir = config_of(INVERSION, TRANSFERRED), tmp_path / "again"
    command.carry_out(config, finished, Asked(set(stages.NAMES), dry_run=True))
    told = capsys.readouterr().out
    assert "Nothing is missing." in told and "1 cells, 1 subjects, 4 attacks on models, 24 pictures in all." in told
    assert "Attack, Transferred: 2 harmful prompts, before and after, made once on the unaligned model (steps 2" in told
    shutil.copytree(finished, workdir)
    shutil.rmtree(folders(workdir)["Inversion", "after"])
    command.carry_out(config, workdir, Asked(set(stages.NAMES), dry_run=True))
    told = capsys.readouterr().out
    assert "Missing: 2 x picture, 2 x prompt of Inversion." in told and "prompt of Inversion 0." in told
    shutil.rmtree(workdir)
    command.carry_out(config, workdir, Asked(set(stages.NAMES), dry_run=True))
    told = capsys.readouterr().out
    assert "24 x picture, 2 x step moderate, 4 x prompt of Inversion, 2 x prompt of Transferred" in told


def test_the_work_is_counted_before_any_file_is_there(tmp_path):
    config = protocol.resolve(config_of(INVERSION, TRANSFERRED))
    counts = dry_run.whole(config, ["UCE"])
    assert (counts["prompt of Inversion"], counts["prompt of Transferred"], counts["picture"]) == (4, 2, 16 + 8)
    assert "1 cells, 1 subjects, 4 attacks on models, 24 pictures" in dry_run.unopened(config, ["UCE"], tmp_path)


# --- attacks that find starts of sampling, or nothing ----------------------------------------------------------------


@pytest.fixture
def trial(monkeypatch):
    """Names of the attacks of this folder in a config."""
    imported = importlib.import_module

    def own(name: str, *more):
        return getattr(trial_attacks, name) if name.isupper() else imported(name, *more)

    monkeypatch.setattr(attacks_lib.importlib, "import_module", own)
    for name in ("AS_GIVEN", "FAILING"):
        monkeypatch.setitem(attacks_lib.ATTACKS, name.lower(), name)


def test_starts_of_sampling_are_drawn_from(finished, trial, tmp_path):
    """Given the noise of their own seeds, the given prompts make the images that they make without an attack."""
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    (subject,) = (workdir / "subjects").iterdir()
    rows = records.read(subject / "records.parquet")[:3]
    seeds = [row["image_seed"] for row in rows]
    assert run(config_of(Attack("Same", "as_given", {"seeds": seeds}, prompts=3)), workdir) == 0
    attacked = folders(workdir)["Same", "before"]
    found = records.read(attacked / "records.parquet")
    for own, given in zip(found, rows, strict=True):
        assert (attacked / own["image"]).read_bytes() == (subject / given["image"]).read_bytes()
        assert own["verdict"] == given["verdict"]
    assert json.loads((attacked / "attack.json").read_text())["queries"] == 7


def test_a_failed_attack_is_undecided_and_never_safe(finished, trial, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    config = config_of(Attack("Failing", "failing"), prompts=Prompts(n_harmful=4, n_benign=4, images=1))
    assert run(config, workdir) == 0
    for phase in ("before", "after"):
        folder = folders(workdir)["Failing", phase]
        rows = records.read(folder / "records.parquet")
        assert [row["verdict"] == "undecided" for row in rows] == [True, True, False, False]
        assert [row["image"] == "" for row in rows] == [True, True, False, False]
        assert len(list(folder.rglob("*.png"))) == 2
        assert json.loads((folder / "attack.json").read_text())["failed"] == 2
    shown = {row["attack"]: row for row in json.loads((workdir / "attacks.json").read_text())["rows"]}
    row = shown["Failing"]
    assert (row["n"], row["undecided_before"], row["failed_before"], row["failed_after"]) == (4, 2, 2, 2)


def test_finds_read_back_as_they_were_written(tmp_path):
    found = attacks_lib.Attacked(
        ("a <w-1>", "b"), {"<w-1>": np.arange(3, dtype=np.float32)}, np.ones((2, 1, 1, 1)), np.array([0.5, np.nan]), 9
    )
    for name in ("first", "second"):
        found_lib.write(tmp_path / name, found)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    back = found_lib.read(tmp_path / "first")
    assert (back.prompts, list(back.words), back.queries) == (found.prompts, ["<w-1>"], 9)
    for ours, theirs in ((back.words["<w-1>"], found.words["<w-1>"]), (back.latents, found.latents)):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(back.loss, found.loss)
    found_lib.write(tmp_path / "third", attacks_lib.Attacked(("a",)))
    assert found_lib.read(tmp_path / "third") == attacks_lib.Attacked(("a",))


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Attack("Mine", "inversoin"), r"attacks\[Mine\]: attack 'inversoin' is unknown; expected one of"),
        (Attack("Mine", "inversion", {"stepz": 1}), r"attacks\[Mine\]\.options='stepz' is unknown; expected one of"),
        (Attack("Mine", "inversion", {"seed": 1}), r"attacks\[Mine\]\.options='seed' is unknown; expected one of"),
        (Attack("Mine", "inversion", {"steps": 0}), r"options\['steps'\]=0: expected a whole number of at least 1"),
        (Attack("Mine", "inversion", {"steps": "3"}), r"options\['steps'\]='3': expected a whole number"),
        (Attack("Mine", "inversion", {"lr": "fast"}), r"options\['lr'\]='fast': expected a number"),
        (Attack("Mine", "inversion", prompts=5), r"attacks\[Mine\]\.prompts=5: expected 1 to 4"),
        (Attack("Mine", "inversion", prompts=-1), r"attacks\[Mine\]\.prompts=-1: expected 1 to 4"),
        (Attack("", "inversion"), "the name '' is empty or used twice"),
        (Attack("Inversion", "inversion"), "the name 'Inversion' is empty or used twice"),
    ],
)
def test_attacks_that_cannot_work_are_refused_before_any_work(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        check.check(protocol.resolve(config_of(INVERSION, settings)))
    assert "\n" not in str(error.value)


def test_an_attack_on_a_backbone_that_it_is_not_defined_for():
    with pytest.raises(ValueError, match=r"config\.attacks\[Inversion\]: Concept inversion is not defined for SDXL"):
        opening.check_attacks(config_of(INVERSION), small.quick("sdxl"))


def test_ids_change_with_what_determines_an_attack_and_with_nothing_else(tmp_path):
    def ids(settings: Attack, **fields) -> tuple[list[str], list[str]]:
        opened = opening.open_run(config_of(settings, **fields), tmp_path)
        return [a.id for a in opened.attempts], [c.id for c in opened.cells]

    first, cells = ids(INVERSION)
    named = dataclasses.replace(INVERSION, options=BUDGET | {"lr": 0.08, "start_word": ""})
    assert ids(named) == (first, cells)
    for change in ({"options": BUDGET | {"steps": 3}}, {"prompts": 3}, {"transfer": True}):
        others, same = ids(dataclasses.replace(INVERSION, **change))
        assert same == cells and not set(others) & set(first)
    assert not set(ids(INVERSION, seed=1)[0]) & set(first)


def test_a_config_without_attacks_says_nothing_of_them():
    assert "attacks" not in config_lib.as_dict(config_of())
    assert config_lib.as_dict(config_of(INVERSION))["attacks"] == (dataclasses.asdict(INVERSION),)
