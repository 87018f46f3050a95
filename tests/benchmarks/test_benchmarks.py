"""What the benchmarks' figures rest on: sides in processes of their own, turns, first calls, ratios."""

import os
import time

import pytest

from benchmarks import models, side_by_side
from benchmarks.side_by_side import Prepared, Ratio, Side, Timed, race

NAP, FIRST_NAP = 0.01, 0.2


def sleeper(seconds: float) -> Prepared:
    """A task that is timed, slower when first called, and one that says its own time."""
    calls: list[int] = []

    def nap() -> tuple[int, int, str]:
        calls.append(1)
        time.sleep(FIRST_NAP if len(calls) == 1 else NAP)
        return os.getpid(), len(calls), os.environ.get("SIDE", "")

    return Prepared({"nap": nap, "said": lambda: Timed(seconds, "by itself")}, {"loading": 0.25})


def broken() -> Prepared:
    def task():
        raise ArithmeticError("out of numbers")

    return Prepared({"nap": task}, {})


@pytest.fixture(scope="module", params=[False, True], ids=["together", "apart"])
def found(request):
    sides = {"ours": Side(sleeper, (2.0,), {"SIDE": "left"}), "theirs": Side(sleeper, (6.0,), {"SIDE": "right"})}
    return race(sides, ["nap", "said"], rounds=2, apart=request.param)


def test_first_calls_are_kept_apart_from_turns(found):
    for side, seconds in (("ours", 2.0), ("theirs", 6.0)):
        assert len(found.seconds[side]["nap"]) == 2 and min(found.seconds[side]["nap"]) < FIRST_NAP
        assert len(found.starts[side]) == 2
        assert all(start.first["nap"] >= FIRST_NAP for start in found.starts[side])
        assert all(start.prepare == {"loading": 0.25} for start in found.starts[side])
        assert found.seconds[side]["said"] == [seconds] * 2 and found.values[side]["said"] == "by itself"
        assert 0.005 < found.peak[side] < 8


def test_sides_have_processes_and_environments_of_their_own(found):
    (ours, call, left), (theirs, _, right) = (found.values[side]["nap"] for side in ("ours", "theirs"))
    assert len({ours, theirs, os.getpid()}) == 3 and call == 1
    assert (left, right) == ("left", "right") and "SIDE" not in os.environ


def test_rows(found):
    nap, said = side_by_side.speed_rows(found, "ours", {"said": 5})
    assert nap["task"] == "nap" and (said["ours"], said["theirs"]) == (0.4, 1.2) and said["theirs / ours"] == (3, 3, 3)
    starts = {row["seconds"]: row for row in side_by_side.start_rows(found)}
    assert starts["loading; cache filled"] == {"seconds": "loading; cache filled", "ours": 0.25, "theirs": 0.25}
    assert starts["first nap, beyond the usual; no cache"]["ours"] > 0
    table = side_by_side.markdown([nap, said])
    assert table.count("\n") == 4 and "3.00 [3.00, 3.00]" in table


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="out of numbers"):
        race({"ours": Side(broken)}, ["nap"], rounds=1)


def test_ratio_is_taken_turn_by_turn():
    """A machine that slows down by half in the middle changes no ratio."""
    assert side_by_side.ratio([2.0, 4.0, 2.2], [1.0, 2.0, 1.0]) == Ratio(2.0, 2.0, 2.2)
    with pytest.raises(ValueError):
        side_by_side.ratio([1.0], [1.0, 2.0])


def test_workloads():
    assert models.evaluations(models.WORKLOADS["sd15"]) == 21 and models.evaluations(models.WORKLOADS["mini"]) == 12
    assert len(set(models.prompts(16))) == 16
