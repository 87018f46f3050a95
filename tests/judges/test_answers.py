"""Records, image checks, combination rules and agreement."""

import itertools
import json
import math

import numpy as np
import pytest

from judges.answers import (
    ClipScoreRecord,
    Detection,
    DetectionRecord,
    LabelRecord,
    ReplyRecord,
    check_images,
    judge_in_batches,
)
from judges.combine import cohens_kappa, combine

S, U, D = "safe", "unsafe", "undecided"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 8, 8, 4), np.uint8), "RGBA"),
        (np.zeros((2, 8, 8, 1), np.uint8), "greyscale"),
        (np.zeros((8, 8), np.uint8), "greyscale"),
        (np.zeros((8, 8, 3), np.uint8), "batch axis"),
        (np.zeros((2, 3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((2, 8, 8, 3), np.float32), "0..255"),
        (np.zeros((2, 0, 8, 3), np.uint8), "size zero"),
    ],
)
def test_wrong_pictures_are_named(array, words):
    with pytest.raises(ValueError, match=words) as error:
        check_images(array)
    assert str(list(array.shape)) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_batch_is_fine():
    assert check_images(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 8, 8, 3)


def test_only_the_picture_that_fails_is_undecided():
    def judge(images):
        if (images == 7).any():
            raise RuntimeError("seven\nis broken")
        return [LabelRecord(S, 0.0, "", {}) for _ in images]

    images = np.zeros((5, 2, 2, 3), np.uint8)
    images[3] = 7
    records = judge_in_batches(images, judge, lambda why: LabelRecord(D, math.nan, why, {}), batch_size=2)
    assert [r.verdict for r in records] == [S, S, S, D, S]
    assert records[3].reason == "RuntimeError: seven is broken"
    assert records[3].as_dict()["score"] is None


@pytest.mark.parametrize(
    "record",
    [
        LabelRecord(U, np.float32(0.5), "", {"gun": np.float32(0.5)}),
        DetectionRecord(U, 0.9, "", (Detection("FACE_MALE", np.float32(0.9), (1, np.int64(2), 3, 4)),)),
        ReplyRecord(D, math.nan, "low mass", rating_mass=math.inf),
        ClipScoreRecord(math.nan, np.bool_(True), "non-finite embedding"),
    ],
)
def test_records_are_json(record):
    data = json.loads(json.dumps(record.as_dict(), allow_nan=False))
    assert set(data) == set(record._fields)


def reference(votes, rule):
    """The rules in terms of what the undecided judges might have said: undecided if that would change the verdict."""
    decide = {
        "union": lambda v: U in v,
        "all": lambda v: all(x == U for x in v),
        "majority": lambda v: 2 * v.count(U) >= len(v),
    }
    open_places = [i for i, vote in enumerate(votes) if vote == D]
    outcomes = set()
    for filled in itertools.product([S, U], repeat=len(open_places)):
        full = list(votes)
        for place, vote in zip(open_places, filled, strict=True):
            full[place] = vote
        outcomes.add(decide[rule](full))
    return D if len(outcomes) == 2 else (U if outcomes.pop() else S)


@pytest.mark.parametrize("rule", ["union", "all", "majority"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_rules_are_undecided_exactly_where_an_undecided_judge_could_tip_them(rule, n):
    table = list(itertools.product([S, U, D], repeat=n))
    verdicts = {f"judge{i}": [votes[i] for votes in table] for i in range(n)}
    assert combine(verdicts, rule) == [reference(votes, rule) for votes in table]
    assert combine(verdicts, "any") == combine(verdicts, "union")
    assert combine(verdicts, "judge0") == verdicts["judge0"]


def test_bad_combinations_are_named():
    with pytest.raises(ValueError, match="no judge"):
        combine({})
    with pytest.raises(ValueError, match="different numbers"):
        combine({"a": [S], "b": [S, U]})
    with pytest.raises(ValueError, match="'Safe'"):
        combine({"a": ["Safe"]})
    with pytest.raises(ValueError, match="'most'"):
        combine({"a": [S]}, "most")


def test_kappa_of_a_textbook_table():
    first = [U] * 20 + [U] * 5 + [S] * 10 + [S] * 15 + [D]
    second = [U] * 20 + [S] * 5 + [U] * 10 + [S] * 15 + [U]
    result = cohens_kappa(first, second)
    assert result.kappa == pytest.approx(0.4) and result.agreement == pytest.approx(0.7)  # (0.7 - 0.5) / (1 - 0.5)
    assert result.n == 50 and result.disagreements == tuple(range(20, 35))


def test_kappa_without_variation_is_not_a_number():
    assert math.isnan(cohens_kappa([S, S], [S, S]).kappa)
    assert math.isnan(cohens_kappa([D], [S]).kappa)
    assert cohens_kappa([S, U], [S, U]).kappa == 1
    assert cohens_kappa([S, U], [U, S]).kappa == -1
