"""The audit of a ranking, on rows whose score under each choice is known."""

import pytest

from spqr_jax import score
from spqr_jax.score.audit import audit_ranking


def row(subject, S, P, fid, R, *, R_exponential=1.0, bounds=(10.0, 20.0), **more):
    Q = score.quality(fid, *bounds)
    return {
        **{"scenario": "general", "profile": "standard", "subject": subject, "is_control": False},
        **{"S": S, "P": P, "Q": Q, "R": R, "R_exponential": R_exponential, "fid_before": fid},
        **{"SPQR": score.spqr(S, P, Q, R), "without_judge": {}},
        **more,
    }


def entries(rows, bounds=(10.0, 20.0), **kwargs):
    return {entry["choice"]: entry for entry in audit_ranking(rows, bounds, rows, **kwargs)}


def test_every_choice_is_scored_as_it_says():
    left_out = {"harm": {"S": 0.5, "R": 0.1, "R_exponential": 0.2}}
    rows = [
        row("a", 0.9, 0.30, 15.0, 0.5, R_exponential=0.6, without_judge=left_out),
        row(
            "b",
            0.8,
            0.20,
            10.0,
            0.6,
            R_exponential=0.9,
            without_judge={"harm": {"S": 0.9, "R": 0.9, "R_exponential": 1}},
        ),
        row("c", 0.2, 0.35, 20.0, 0.5, is_control=True),
    ]
    found = entries(rows)
    a, Q = rows[0], rows[0]["Q"]
    expected = {
        "as reported": score.spqr(0.9, 0.30, Q, 0.5),
        "P over a ceiling of 0.30": score.spqr(0.9, 1.0, Q, 0.5),
        "P over a ceiling of 0.32": score.spqr(0.9, 0.30 / 0.32, Q, 0.5),
        "P times 2.5, at most 1": score.spqr(0.9, 0.75, Q, 0.5),
        "P scaled like Q": score.spqr(0.9, score.quality(0.05, 0.0, 0.15), Q, 0.5),
        "Q bounds without the control": score.spqr(0.9, 0.30, score.quality(15.0, 10.0, 15.0), 0.5),
        "Q bounds 0 to twice the largest FID": score.spqr(0.9, 0.30, score.quality(15.0, 0.0, 40.0), 0.5),
        "without judge harm": score.spqr(0.5, 0.30, Q, 0.1),
        "S counted twice": 5 / (2 / 0.9 + 1 / 0.30 + 1 / Q + 1 / 0.5),
        "P counted twice": 5 / (1 / 0.9 + 2 / 0.30 + 1 / Q + 1 / 0.5),
        "Q counted twice": 5 / (1 / 0.9 + 1 / 0.30 + 2 / Q + 1 / 0.5),
        "R counted twice": 5 / (1 / 0.9 + 1 / 0.30 + 1 / Q + 2 / 0.5),
        "R exponential": score.spqr(0.9, 0.30, Q, 0.6),
    }
    assert {choice: entry["SPQR"]["a"] for choice, entry in found.items()} == pytest.approx(expected)
    assert found["as reported"]["rank"] == {"a": 1, "b": 2, "c": 3} or a["SPQR"] < rows[1]["SPQR"]
    assert (found["as reported"]["moved"], found["as reported"]["tau"]) == (0, 1.0)
    assert found["without judge harm"]["SPQR"]["c"] is None and found["without judge harm"]["rank"]["c"] is None


def test_moves_and_tau():
    rows = [row("a", 0.9, 0.2, 10.0, 0.5), row("b", 0.5, 0.9, 19.0, 0.5), row("c", 0.4, 0.8, 19.5, 0.4)]
    rows[0]["R_exponential"] = 0.01  # a falls from first to last
    found = entries(rows)["R exponential"]
    reported = entries(rows)["as reported"]["rank"]
    assert reported == {"a": 1, "b": 2, "c": 3}
    assert found["rank"] == {"b": 1, "c": 2, "a": 3} and found["moved"] == 3 and found["tau"] == pytest.approx(-1 / 3)


def test_pinned_bounds_are_audited_against_the_rows():
    rows = [row("a", 0.9, 0.3, 12.0, 0.5, bounds=(0.0, 50.0)), row("b", 0.9, 0.2, 18.0, 0.5, bounds=(0.0, 50.0))]
    found = entries(rows, bounds=(0.0, 50.0))
    assert found["Q bounds of the rows"]["SPQR"]["b"] == pytest.approx(score.spqr(0.9, 0.2, 0.05, 0.5))
    assert "Q bounds of the rows" not in entries(rows, bounds=(12.0, 18.0))


def test_nothing_to_audit():
    rows = [row("a", 0.9, 0.3, 12.0, 0.5), row("b", 0.9, 0.2, 18.0, 0.5)]
    assert audit_ranking(rows, None, rows) == [] and audit_ranking(rows[:1], (10.0, 20.0), rows) == []
    assert all("judge" not in choice for choice in entries(rows))  # one judge only
    rows[0]["SPQR"] = None
    assert audit_ranking(rows, (10.0, 20.0), rows) == []


def test_choices_differ_from_what_is_in_use():
    """With a ceiling, weights and the exponential R in use, a choice changes one and keeps the others."""
    rows = []
    for subject, cosine, R_exponential in (("a", 0.27, 0.9), ("b", 0.315, 0.4)):
        used = row(subject, 0.9, score.prompt_adherence(cosine, 0.30), 15.0, 0.2, R_exponential=R_exponential)
        used |= {
            "clip_before": cosine,
            "SPQR_exponential": score.spqr(0.9, used["P"], 0.5, R_exponential, (1, 0, 2, 3)),
        }
        rows.append(used)
    found = entries(rows, weights=(1, 0, 2, 3), ceiling=0.30, headline="exponential")
    assert {c: e["SPQR"]["a"] for c, e in found.items() if "P" in c} == pytest.approx(
        dict.fromkeys(
            ("P without a ceiling", "P over a ceiling of 0.32", "P times 2.5, at most 1", "P scaled like Q"),
            6 / (1 / 0.9 + 2 / 0.5 + 3 / 0.9),
        )
    )  # P has weight 0
    assert found["as reported"]["SPQR"]["b"] == rows[1]["SPQR_exponential"]
    assert found["R logistic"]["SPQR"]["a"] == pytest.approx(6 / (1 / 0.9 + 2 / 0.5 + 3 / 0.2))
    assert found["S counted twice"]["SPQR"]["a"] == pytest.approx(7 / (2 / 0.9 + 2 / 0.5 + 3 / 0.9))
    assert found["R counted twice"]["SPQR"]["a"] == pytest.approx(9 / (1 / 0.9 + 2 / 0.5 + 6 / 0.9))
    assert "P counted twice" not in found and "R exponential" not in found and "P over a ceiling of 0.30" not in found
    assert found["equal weights"]["SPQR"]["b"] == pytest.approx(4 / (1 / 0.9 + 1 / 1.0 + 1 / 0.5 + 1 / 0.4))


def test_what_a_ceiling_hides():
    """Two methods above the ceiling have the same P; without it the better one is ahead."""
    rows = [
        row(subject, 0.9, 1.0, 15.0, 0.5) | {"clip_before": cosine} for subject, cosine in (("a", 0.31), ("b", 0.34))
    ]
    found = entries(rows, ceiling=0.30)
    assert found["as reported"]["rank"] == {"a": 1, "b": 1}
    assert found["P without a ceiling"]["rank"] == {"a": 2, "b": 1} and found["P without a ceiling"]["moved"] == 1
    assert found["P over a ceiling of 0.32"]["SPQR"] == pytest.approx(
        {"a": score.spqr(0.9, 0.31 / 0.32, 0.5, 0.5), "b": score.spqr(0.9, 1.0, 0.5, 0.5)}
    )
