"""Probes in a run of the emoji world: before fine-tuning alone, and (slow) through the whole chain."""

import dataclasses
import json

import pytest

from spqr_jax import config as config_lib
from spqr_jax.config import BFT, Config, Generation, Judges, PerProfile, Probe, Prompts, Score, Subject
from spqr_jax.files import records
from spqr_jax.files.layout import CellFolder, SubjectFolder, WeightsFolder
from spqr_jax.report import tables, tabular
from spqr_jax.report.reading import read
from spqr_jax.run import check, command, dry_run, opening, protocol, stages
from spqr_jax.run.cells import Cell, Model, SubjectDir
from spqr_jax.run.command import Asked
from spqr_jax.run.missing import MissingFiles
from spqr_jax.submission import pack, stated

ALIKE = Probe("Look-alikes", "mini:lookalikes", n=4)
IMPLICIT = Probe("Implicit", "mini:implicit", role="harmful", n=4)


def config_of(*probes: Probe, **fields) -> Config:
    defaults = {
        "concept": "mini:weapons",
        "subjects": (Subject("No alignment"), Subject("UCE", "uce")),
        "probes": probes,
        "prompts": Prompts(n_harmful=4, n_benign=4),
        "generation": Generation(steps=2, guidance=4.0, scheduler="dpmpp", batch_size=4),
        "bft": BFT(
            profiles=("moderate",), samples=8, curriculum=(8,), batch_size=4, steps=PerProfile(1, 1, 1), warmup_steps=1
        ),
        "judges": Judges(n_reference=16),
        "score": Score(replicates=100),
    }
    return Config(**(defaults | fields))


def run(config: Config, workdir, *names: str) -> int:
    return command.carry_out(config, workdir, Asked(set(names or stages.NAMES) - {"report"}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the content of its files before the same run was asked for probes."""
    workdir = tmp_path_factory.mktemp("probes") / "run"
    assert run(config_of(), workdir) == 0
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert not [path for path in workdir.rglob("*probe*") if "compilation_cache" not in path.parts]
    without = pack.of_run(workdir)
    assert run(config_of(ALIKE, IMPLICIT), workdir) == 0
    return workdir, kept, without


def folders(workdir) -> dict[tuple[str, str, str], dict]:
    """(probe, subject, phase) -> folder of every complete probe."""
    summaries = {path.parent: json.loads(path.read_text()) for path in workdir.glob("probes/*/probe.json")}
    return {(said["probe"], said["subject"], said["phase"]): folder for folder, said in summaries.items()}


@pytest.mark.slow
def test_nothing_else_changes(finished):
    workdir, kept, without = finished
    compiled = workdir / "compilation_cache"
    assert len(kept) > 20
    assert {path: path.read_bytes() for path in kept if compiled not in path.parents} == {
        path: content for path, content in kept.items() if compiled not in path.parents
    }
    packed = pack.of_run(workdir)
    assert packed.manifest == without.manifest and packed.leaderboard == without.leaderboard
    assert stated.config_of(json.loads((workdir / "manifest.json").read_text())).probes == (ALIKE, IMPLICIT)


@pytest.mark.slow
def test_records_are_like_any_other(finished):
    workdir, *_ = finished
    found = folders(workdir)
    assert len(found) == 2 * 2 * 2
    for (probe, subject, phase), folder in found.items():
        rows, benign = records.read(folder / "records.parquet"), probe == "Look-alikes"
        assert len(rows) == 4 and {row["prompt_set"] for row in rows} == {probe}
        assert {(row["role"], row["phase"]) for row in rows} == {("benign" if benign else "harmful", phase)}
        assert {row["subject"] for row in rows} == {subject}
        assert {row["profile"] for row in rows} == {"" if phase == "before" else "moderate"}
        assert all((folder / row["image"]).is_file() and row["verdict"] in ("safe", "unsafe") for row in rows)
        assert all((row["clip_score"] == row["clip_score"]) == benign for row in rows)
    before, after = (records.read(found["Look-alikes", "UCE", phase] / "records.parquet") for phase in records.PHASES)
    assert [row["image_seed"] for row in before] == [row["image_seed"] for row in after]


@pytest.mark.slow
def test_the_table_has_every_probe_of_every_model(finished):
    workdir, *_ = finished
    (table,) = tables.build(read(workdir), ["probes"])
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert len(lines) == 8 and {(line["Method"], line["Phase"]) for line in lines} == {
        (subject, phase) for subject in ("No alignment", "UCE") for phase in records.PHASES
    }
    for line in lines:
        alike, control = line["Probe"] == "Look-alikes", line["Method"] == "No alignment"
        assert (line["CLIP"].value is not None) == alike and line["Unsafe, %"].low is not None
        assert (line["CLIP minus control's"].value is not None) == (alike and not control)
        assert (line["minus control's"].value is not None) == (not control)
    assert "| Look-alikes | benign | UCE | after | moderate | general | 4 |" in tabular.markdown(table)


def test_probes_need_no_fine_tuning_and_resume(tmp_path, capsys):
    """Before fine-tuning alone, then again after an image and a summary were lost: the same rows."""
    config = config_of(ALIKE, IMPLICIT, subjects=(Subject("No alignment"),))
    assert run(config, tmp_path, "align", "generate", "probe", "judge", "score") == 0
    assert "Look-alikes: before" in capsys.readouterr().out
    first, found = (tmp_path / "probes.json").read_bytes(), folders(tmp_path)
    rows = {row["probe"]: row for row in json.loads(first)["rows"]}
    assert rows["Look-alikes"]["clip"] > rows["Look-alikes"]["clip_ci"][0] and rows["Implicit"]["clip"] is None
    lost = found["Look-alikes", "No alignment", "before"]
    next(lost.rglob("*.png")).unlink()
    (lost / "probe.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in found["Implicit", "No alignment", "before"].rglob("*.*")}
    assert run(config, tmp_path, "probe", "judge", "score") == 0
    assert (tmp_path / "probes.json").read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_work_is_counted_before_any_file_is_there(tmp_path):
    config = protocol.resolve(config_of(ALIKE, IMPLICIT))
    assert dry_run.whole(config, ["UCE"])["picture"] == 2 * (8 + 8)
    assert "4 probes of models, 32 pictures" in dry_run.unopened(config, ["UCE"], tmp_path)
    assert "Probe, Implicit: 4 harmful prompts of mini:implicit, before and after." in dry_run.plan(config)


@pytest.mark.slow
def test_a_dry_run_counts_probes(finished, capsys):
    workdir, *_ = finished
    config = config_of(ALIKE, IMPLICIT)
    command.carry_out(config, workdir, Asked(set(stages.NAMES), dry_run=True))
    told = capsys.readouterr().out
    assert "Nothing is missing." in told and "8 probes of models, 64 pictures in all." in told


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        (Probe("", "mini:others"), "the name '' is empty or used twice"),
        (Probe("Look-alikes", "mini:others"), "the name 'Look-alikes' is empty or used twice"),
        (Probe("A", "mini:others", role="good"), r"probes\[A\]\.role='good' is unknown; expected one of harmful"),
    ],
)
def test_probes_that_cannot_work_are_refused(probe, says):
    with pytest.raises(ValueError, match=says):
        check.check(protocol.resolve(config_of(ALIKE, probe)))


def test_sets_that_are_not_there_are_in_the_table_of_missing_things(tmp_path):
    few = Probe("Few", "mini:named", n=1)
    config = config_of(Probe("Others", "mini:others"), Probe("Hard", "emma:7_hard.json"), few, concept="mini")
    with pytest.raises(MissingFiles, match=r"probes\[Others\]") as error:
        opening.open_run(config, tmp_path)
    assert "set concept to mini:CATEGORY" in str(error.value) and "probes[Hard]" in str(error.value)
    assert "1 prompts have no interval" in str(error.value)


def test_a_config_without_probes_says_nothing_of_them():
    assert "probes" not in config_lib.as_dict(config_of())
    assert config_lib.as_dict(config_of(ALIKE))["probes"] == (dataclasses.asdict(ALIKE),)


def test_models_that_need_no_training_are_there_at_once(tmp_path):
    """Also after an adapter of a file was merged, which leaves no trained weights on the disk."""
    subject = SubjectDir(Subject("UCE", "uce"), "uce", WeightsFolder(tmp_path), SubjectFolder(tmp_path))
    for profile, there in (("lite", False), ("adapter:mine", True)):
        cell = Cell(subject, profile, "general", 42, "cell", CellFolder(tmp_path / "cell"))
        assert Model(subject, cell).there is there
    assert Model(subject).there
