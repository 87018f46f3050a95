"""Tables of several submissions: the same figures as if one run had made all of their rows."""

import json
import shutil

import numpy as np
import pytest

from spqr_jax.board import pages, references, site, store, tables
from spqr_jax.files.layout import Workdir
from spqr_jax.score import leaderboard
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import scores
from tests.board import bundles
from tests.submission.mutations import sealed

RENAMED = ("subject", "a", "b")


def by_subject(board, **names):
    """The rows of a table, without the parts of a joint name that a run has not."""
    return {row["subject"]: row for row in board["rows"] if all(row[k] == v for k, v in names.items())}


def table_of(board, subject: str, profile: str = "lite"):
    return next(t for t in board.tables if t.conditions.profile == profile and subject in subjects(t))


def subjects(table) -> list[str]:
    return [line.row["subject"] for line in table.lines]


def test_a_board_of_one_submission_is_its_leaderboard(made):
    own = json.loads((made / "bundles" / "nasty" / "leaderboard.json").read_text(encoding="utf-8"))
    found = tables.build([store.submission(made / "bundles" / "nasty", made / "cache")])
    assert [t.conditions.profile for t in found] == ["lite", "standard"]
    for table in found:
        expected = by_subject(own, profile=table.conditions.profile)
        assert [line.row for line in table.lines] == sorted(expected.values(), key=lambda row: row["rank"])
        pairs = [c for c in own["comparisons"] if c["profile"] == table.conditions.profile]
        found_pairs = [
            pair.figures | {"a": pair.first.row["subject"], "b": pair.second.row["subject"]} for pair in table.pairs
        ]
        assert found_pairs == pairs


def test_rows_of_two_submissions_are_ranked_as_those_of_one_run(made, board, tmp_path):
    """The cells of both in one work directory, scored by the code that scores a run."""
    for name in ("b", "a"):
        shutil.copytree(made / "runs" / name, tmp_path, dirs_exist_ok=True)
    Workdir(tmp_path).leaderboard().unlink()
    expected = leaderboard.build(tmp_path)
    table = table_of(board, "UCE")
    assert set(subjects(table)) == {"No alignment", "UCE", "ESD", "RECE", "Mine", 'Quote" onclick="alert(2)', "Two"}
    own = [line for line in table.lines if line.row["subject"] in by_subject(expected)]
    without_nasty = tables.build([s for s in board.submissions if s.name in ("a", "b")])[0]
    assert len(own) == 5 and subjects(without_nasty) == [row["subject"] for row in expected["rows"]]
    rows = by_subject(expected)
    for line in without_nasty.lines:
        row = rows[line.row["subject"]]
        for name in ("rank", "rank_ci", "S", "R", "h_after", "dh_ci"):
            assert line.row[name] == row[name], name
        for name in ("Q", "SPQR"):  # b's reference images have features that are rounded otherwise
            assert line.row[name] == pytest.approx(row[name], abs=2e-4), name
    pairs = {(c["a"], c["b"]): c for c in expected["comparisons"]}
    assert len(without_nasty.pairs) == len(pairs) == 10
    for pair in without_nasty.pairs:
        found = pairs[pair.first.row["subject"], pair.second.row["subject"]]
        assert (pair.figures["dh_ci"], pair.figures["dh_p_holm"]) == (found["dh_ci"], found["dh_p_holm"])
        assert pair.figures["SPQR_ci"] == pytest.approx(found["SPQR_ci"], abs=1e-3)


def test_other_reference_images_make_another_table(made, board):
    """The same name, other features: rows that look closer to images of their own choice do not rank among others."""
    apart = [t for t in board.tables if t.apart]
    assert len(apart) == 1 and subjects(apart[0]) == ["RECE"] and apart[0].anchor.startswith("t-")
    main = table_of(board, "UCE")
    assert main.conditions.id == apart[0].conditions.id and main.anchor != apart[0].anchor and not main.apart
    one, other = ({"mu": np.zeros(3), "sigma": np.eye(3) * scale} for scale in (1.0, 1.0 + 1e-6))
    assert references.agree(one, other)
    assert not references.agree(one, {"mu": np.zeros(3), "sigma": np.eye(3) * 1.01})
    assert not references.agree(one, {"mu": np.full(3, 0.01), "sigma": np.eye(3)})


def test_other_conditions_make_another_table(made, tmp_path):
    more = bundles.bundle(tmp_path, "more", ("UCE",), draw=1, config={"n_harmful": 10})
    found = tables.build([store.submission(path, None) for path in (made / "bundles" / "a", more)])
    assert [len(table.lines) for table in found] in ([3, 1], [1, 3])
    assert len({table.anchor for table in found}) == 2


def test_equal_results_are_one_line_or_are_named(made):
    """A row that two submissions share stands once; the same results under another name are marked."""
    a = store.submission(made / "bundles" / "a", made / "cache")
    both = tables.build([a, a._replace(verification=a.verification._replace(id="f" * 64))])[0]
    assert [len(line.also) for line in both.lines] == [1, 1, 1]
    renamed = a._replace(entries=(a.entries[0], a.entries[1]._replace(evidence=a.entries[0].evidence)))
    lines = tables.build([renamed])[0].lines
    assert len(lines) == 2 and all(len(line.copies) == 1 for line in lines)


def test_other_figures_of_the_same_cells_are_marked(made, tmp_path):
    """A bundle whose records were changed, and all of whose digests and scores were made again, stands beside it."""
    read = bundle_lib.read(made / "bundles" / "a")
    features = read.cells[0].features | {"after_benign": read.cells[0].features["after_benign"] * np.float32(0.5)}
    changed = read._replace(cells=(read.cells[0]._replace(features=features), *read.cells[1:]))
    path = sealed(changed._replace(leaderboard=scores.recomputed(changed)), tmp_path / "other")
    submissions = [store.submission(made / "bundles" / "a", None), store.submission(path, None)]
    assert all(s.verification.verified for s in submissions)
    table = tables.build(submissions)[0]
    marked = [(line.row["subject"], line.submission.id, [s.id for s in line.rivals]) for line in table.lines]
    subject, ids = read.cells[0].info["subject"], [s.id for s in submissions]
    assert sorted(m for m in marked if m[2]) == sorted([(subject, ids[0], [ids[1]]), (subject, ids[1], [ids[0]])])
    text = pages.index(pages.Board("x", submissions, [], [table]))
    assert text.count("other figures of the same cells in") == 2


def test_refused_bundles_have_no_row(board):
    assert [s.name for s in board.refused] == ["<img src=x onerror=alert(3)>"]
    assert any("leaderboard.json" in line for line in board.refused[0].verification.faults)
    assert board.refused[0].entries == () and board.refused[0].leaderboard == {}
    assert [s.name for s in sorted(board.submissions, key=lambda s: s.name)] == ["a", "apart", "b", "nasty"]


def test_what_was_verified_is_not_verified_again_unless_a_byte_changed(made, tmp_path, monkeypatch):
    path, cache = tmp_path / "bundle", tmp_path / "cache"
    shutil.copytree(made / "bundles" / "a", path)
    first = store.submission(path, cache)
    monkeypatch.setattr(store, "read", lambda *_: pytest.fail("verified again"))
    again = store.submission(path, cache)
    assert again._replace(entries=()) == first._replace(entries=())
    one, two = tables.build([first])[0], tables.build([again])[0]
    assert [line.row for line in one.lines] == [line.row for line in two.lines]
    assert [pair.figures for pair in one.pairs] == [pair.figures for pair in two.pairs]
    monkeypatch.undo()
    file = path / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace("cpu", "tpu"), encoding="utf-8")
    assert not store.submission(path, cache).verification.verified


def test_seeds_come_back_from_the_cache(tmp_path):
    path = bundles.bundle(tmp_path, "seeds", ("No alignment", "UCE"), draw=5, config={"seeds": (1, 2)})
    first, again = (store.submission(path, tmp_path / "cache") for _ in range(2))
    one, two = tables.build([first])[0], tables.build([again])[0]
    assert first.entries[0].scored.seeds is not None
    assert [pair.figures for pair in one.pairs] == [pair.figures for pair in two.pairs]


def test_a_bundle_that_breaks_the_verifier_is_refused(made, monkeypatch, tmp_path):
    def broken(*_):
        raise RecursionError("too deep")

    monkeypatch.setattr(store, "read", broken)
    found = store.submission(made / "bundles" / "a", None)
    assert found.verification.faults == ["cannot be verified: RecursionError: too deep"]
    monkeypatch.undo()
    assert not store.submission(tmp_path, None).verification.verified


def test_many_rows_are_compared_with_the_next_alone(board, monkeypatch):
    monkeypatch.setattr(tables, "MOST_PAIRS", 5)
    table = tables.build([s for s in board.submissions if s.name in ("a", "b")])[0]
    assert not table.all_pairs and len(table.pairs) == len(table.lines) - 1
    assert [(p.first, p.second) for p in table.pairs] == list(zip(table.lines, table.lines[1:], strict=False))


def test_out_is_never_another_directory(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="other things than a board"):
        site.write([made / "bundles" / "a"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no bundle"):
        site.write([tmp_path / "empty"], tmp_path / "site")
    with pytest.raises(FileNotFoundError, match="no directory"):
        site.write([tmp_path / "nothing"], tmp_path / "site")
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<title>mine</title>")
    with pytest.raises(ValueError, match="other things"):
        site.write([made / "bundles" / "a"], report)
