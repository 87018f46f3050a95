"""Verification: a real bundle passes, and one whose author recomputed everything that can be is still found."""

import contextlib
import json
import math

import pyarrow as pa
import pytest

from spqr_jax.files import records
from spqr_jax.report import __main__ as report
from spqr_jax.run import protocol
from spqr_jax.submission import documents, places, scores, stated, verify
from spqr_jax.submission.bundle import Bundle
from tests.submission.mutations import sealed, stating_its_evidence


def table(rows, kind=records.IMAGES) -> pa.Table:
    return pa.table({name: [row[name] for row in rows] for name in kind.schema.names}, schema=kind.schema)


def with_rows(read: Bundle, edit, cells=slice(None)) -> Bundle:
    """The bundle with the rows of cells edited. edit: rows -> rows."""
    edited = {c.name: c._replace(records=table(edit(c.records.to_pylist()))) for c in read.cells[cells]}
    return read._replace(cells=tuple(edited.get(c.name, c) for c in read.cells))


def with_config(read: Bundle, section: str, **values) -> Bundle:
    """The bundle with other values in its config, and the protocol's statement that goes with them, if there is one."""
    config = read.manifest["config"] | {section: read.manifest["config"][section] | values}
    manifest = read.manifest | {"config": config}
    with contextlib.suppress(ValueError):
        statement = protocol.statement(stated.config_of(manifest))
        manifest |= {"protocol": json.loads(json.dumps(statement._asdict())) | {"label": statement.label}}
    return read._replace(manifest=manifest)


def faults(changed: Bundle, tmp_path, *, rescored: bool = True) -> str:
    """What verification says about a changed bundle, whose author computed scores and digests again."""
    board = scores.recomputed(changed) if rescored else stating_its_evidence(changed).leaderboard
    found = verify.check(sealed(changed._replace(leaderboard=board), tmp_path / "changed"))
    assert not found.verified
    return "\n".join(found.faults)


def test_a_real_bundle_is_verified(made, read, capsys):
    assert report.main(["verify", str(made / "bundle")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"verified: submission {read.id}\ndivision: open\n")
    assert "open because prompts.n_harmful is 8, spqr-jax has 500" in out
    assert report.main(["verify", str(made / "bundle"), "--json", "--id", read.id[:12]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"] and found["id"] == read.id and found["division"] == "open" and not found["faults"]
    assert report.main(["verify", str(made / "bundle"), "--id", "0" * 64]) == 1
    assert f"id {read.id[:12]}, expected 000000000000" in capsys.readouterr().out


def test_the_commands_pack_a_run(made, tmp_path, capsys):
    assert report.main(["submit", str(made / "run"), "--out", str(tmp_path / "out")]) == 0
    index = documents.loads((tmp_path / "out" / places.INDEX).read_bytes(), places.INDEX)
    assert capsys.readouterr().out.strip().endswith(f"{index['bytes']:,} bytes, submission {index['id']}")
    assert report.main(["submit", str(tmp_path), "--out", str(tmp_path / "other")]) == 1
    assert "name the work directory of a finished run" in capsys.readouterr().err


def test_every_digit_of_the_leaderboard_is_computed_again(read, tmp_path):
    board = json.loads(json.dumps(read.leaderboard))
    board["rows"][0]["S_ci"][0] += 1e-6
    text = faults(read._replace(leaderboard=board), tmp_path, rescored=False)
    assert text.startswith("leaderboard.json: rows[0].S_ci[0] is ") and "the records give" in text
    board = json.loads(json.dumps(read.leaderboard))
    board["notes"] = []
    assert "leaderboard.json: notes is []" in faults(read._replace(leaderboard=board), tmp_path, rescored=False)


def test_other_kernels_may_move_the_sixth_digit_of_figures_from_features(read, tmp_path):
    """And of no other figure, by no more, and in no seventh digit."""

    def moved(key, by):
        board = json.loads(json.dumps(stating_its_evidence(read).leaderboard))
        row = next(row for row in board["rows"] if row[key] and 0.1 < abs(row[key]) < 1e5)
        digits = 5 - math.floor(math.log10(abs(row[key])))
        row[key] = float(f"{row[key] + by * 10.0**-digits:.7g}")
        return verify.check(sealed(read._replace(leaderboard=board), tmp_path / "changed"))

    found = moved("fid_before", 1)
    assert found.verified and "the sixth digit of a figure from features: rows[" in found.remarks[0]
    assert not moved("fid_before", 20).verified
    assert not moved("fid_before", 0.5).verified
    assert not moved("h_after", 1).verified


def test_a_bundle_that_is_older_than_a_figure_is_still_verified(read, tmp_path):
    """Where no row has it. A row that lacks it beside rows that have it was changed."""

    def without(*names, rows=slice(None)):
        board = json.loads(json.dumps(stating_its_evidence(read).leaderboard))
        for row in board["rows"][rows]:
            for name in names:
                del row[name]
        return verify.check(sealed(read._replace(leaderboard=board), tmp_path / "changed"))

    old = without(*scores.LATER)
    assert old.verified and "gain, kept, control_h_after: the leaderboard is older than these figures" in old.remarks
    assert without(*scores.LATER, rows=slice(1)).faults[0].endswith("is missing")
    assert without("kept").faults[0] == "leaderboard.json: rows[0].kept is missing"
    assert not without("S").verified


def test_a_verdict_follows_from_the_answers_of_the_judges(read, tmp_path):
    def safe(rows):
        return [row | {"verdict": "safe"} for row in rows]

    assert "verdict is safe, its judges' answers give unsafe" in faults(with_rows(read, safe), tmp_path)

    def called_safe(rows):
        return [r | {"verdict": "safe", "judges": r["judges"].replace('"unsafe"}', '"safe"}')} for r in rows]

    assert "harm: it says safe, its own numbers say unsafe" in faults(with_rows(read, called_safe), tmp_path)


def test_a_judge_cannot_be_made_milder(read, tmp_path):
    """The threshold in the identities says another rule than the one that the verdicts follow."""
    changed = with_config(read, "judges", safety={"harm": "judges/harm.onnx"})
    judges = json.loads(json.dumps(read.manifest["judges"]))
    judges["harm"]["options"]["threshold"] = 0.99999
    cells = tuple(c._replace(info=c.info | {"judges": judges}) for c in read.cells)
    changed = changed._replace(manifest=changed.manifest | {"judges": judges}, cells=cells)
    assert "harm: it says unsafe, its own numbers say safe" in faults(changed, tmp_path)


def test_nothing_is_left_out_or_doubled(read, tmp_path):
    text = faults(read._replace(cells=read.cells[1:]), tmp_path)
    assert f"{read.cells[0].info['subject']} x lite x general x seed 1 is missing, which the config names" in text

    def easier(rows):
        worst = next(row["prompt_id"] for row in rows if row["verdict"] == "unsafe" and row["role"] == "harmful")
        return [row for row in rows if row["prompt_id"] != worst or row["role"] != "harmful"]

    changed = with_rows(read, easier)._replace(cells=with_rows(read, easier).cells)
    assert "images, the config asks for 24" in faults(changed, tmp_path, rescored=False)
    doubled = with_rows(read, lambda rows: [rows[0], *rows], slice(0, 1))
    assert "25 images, the config asks for 24" in faults(doubled, tmp_path, rescored=False)


def test_one_subject_left_out_everywhere(read, tmp_path):
    """A method that scored badly, taken out of the config as well: the statement still fits, and so must all else."""
    config = read.manifest["config"]
    fewer = config | {"subjects": [s for s in config["subjects"] if s["name"] != "RECE"]}
    cells = tuple(c for c in read.cells if c.info["subject"] != "RECE")
    changed = read._replace(manifest=read.manifest | {"config": fewer}, cells=cells)
    board = scores.recomputed(changed)
    found = verify.check(sealed(changed._replace(leaderboard=board), tmp_path / "changed"))
    assert found.verified and found.id != read.id  # this is a smaller submission, which nobody can tell from a run


def test_the_config_is_bound_to_the_ids_of_cells(read, tmp_path):
    assert "the id that the config and the hashes of its inputs give" in faults(
        with_config(read, "generation", scheduler="ddim"), tmp_path
    )
    inputs = read.manifest["sha256"] | {"backbone": "0" * 64}
    config = read.manifest["config"] | {"base": "weights/mine"}
    manifest = {name: value for name, value in read.manifest.items() if name != "mini"}  # an entry of the emoji world's
    other = read._replace(manifest=manifest | {"sha256": inputs, "config": config})
    assert "the id that the config" in faults(other, tmp_path)


def test_the_protocol_is_stated_as_it_was_followed(read, tmp_path):
    bare = {"name": "spqr-jax", "changed": {}, "label": "spqr-jax"}
    assert "protocol is not the statement of its config" in faults(
        read._replace(manifest=read.manifest | {"protocol": bare}), tmp_path
    )
    cells = tuple(c._replace(info=c.info | {"protocol": {"name": "spqr-jax", "changed": {}}}) for c in read.cells)
    assert "cell.json: protocol is" in faults(read._replace(cells=cells), tmp_path)


def test_prompts_are_those_of_the_emoji_world(read, tmp_path):
    prompts = json.loads(json.dumps(read.prompts))
    prompts["harmful"]["prompts"][0] |= {"text": "a red apple"}
    assert "sha256 is not that of its text" in faults(read._replace(prompts=prompts), tmp_path)


def test_images_before_are_shared_by_the_cells_of_a_subject(read, tmp_path):
    def nicer(rows):
        return [r | {"clip_score": 0.9} if r["phase"] == "before" and r["role"] == "benign" else r for r in rows]

    text = faults(with_rows(read, nicer, slice(0, 1)), tmp_path, rescored=False)
    assert "other images before fine-tuning than" in text


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("score", {"replicates": 10**9}, "replicates must be from 1 to 10,000"),
        ("prompts", {"images": 10**12}, "the config asks for 24,000,000,000,000"),
        ("bft", {"seeds": [*range(20_000)]}, "cells, more than a bundle can hold"),
        ("bft", {"batch_size": 0}, "config.bft.batch_size=0 is too small"),
        ("bft", {"epochs": {"lite": -3, "moderate": 3, "standard": 10}}, "finetune.steps"),
        ("bft", {"lr": "fast"}, "config.bft.lr must be float, found str"),
        ("bft", {"more": 1}, "config.bft.more is no field of this version"),
    ],
)
def test_a_config_makes_no_endless_work(read, tmp_path, section, values, reason):
    assert reason in faults(with_config(read, section, **values), tmp_path, rescored=False)


def test_code_that_a_bundle_names_is_not_imported(read, tmp_path, monkeypatch):
    (tmp_path / "trap_of_a_bundle.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads(json.dumps(read.manifest["config"]))
    config["subjects"][1]["method"] = "trap_of_a_bundle.align"
    changed = read._replace(manifest=read.manifest | {"config": config})
    assert "sha256.methods has [], the config names ['trap_of_a_bundle.align']" in faults(changed, tmp_path)
    inputs = read.manifest["sha256"] | {"methods": {"trap_of_a_bundle.align": "0" * 64}}
    changed = read._replace(manifest=read.manifest | {"config": config, "sha256": inputs})
    found = verify.check(sealed(stating_its_evidence(changed), tmp_path / "changed"))
    assert found.verified
    assert "the ids of cells of trap_of_a_bundle.align, a method of another package" in found.remarks


def test_verification_writes_nothing(copied, tmp_path, monkeypatch):
    """Neither into the bundle nor beside it, and it leaves no temporary file."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def files() -> dict:
        return {f: (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b"") for f in tmp_path.rglob("*")}

    before = files()
    assert verify.check(copied).verified
    next(copied.glob("cells/*/records.parquet")).write_bytes(b"PAR1")
    changed = files()
    assert not verify.check(copied).verified
    assert changed == files() and before.keys() == changed.keys()


def test_text_of_a_bundle_stays_text(read, tmp_path):
    for name in ("<script>alert(1)</script>", "a\x1b[2J", "a\u202eb", ""):
        cells = tuple(c._replace(info=c.info | {"subject": name}) for c in read.cells[:1]) + read.cells[1:]
        text = faults(read._replace(cells=cells), tmp_path, rescored=False)
        assert f"cells/{read.cells[0].name}/cell.json: subject: " in text
        assert "\x1b" not in text and "\u202e" not in text
