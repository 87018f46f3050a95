"""Recorded answers: what judges really answer has no fault, and what they cannot have answered has one."""

import copy

import numpy as np
import pytest

from judges import recorded
from judges.answers import UNDECIDED, UNSAFE, ReplyRecord
from judges.classifier import Decision, decide
from judges.classifier import undecided as classifier_undecided
from judges.llavaguard import LlavaGuard, Rating
from judges.llavaguard.rating import parse_reply
from judges.nudenet import NudeNet
from judges.nudenet_v2 import NudeNetV2
from judges.q16 import decide as q16_decide
from tests.judges.test_nudenet import crowded_output, variants

LABELS = tuple("abcdefgh")


def answers_of_a_classifier(rule: str):
    decision = Decision(LABELS, (1, 4, 6), "softmax", rule, 0.5)
    options = {"unsafe": ["b", "e", "g"], "rule": rule, "threshold": 0.5}
    rng = np.random.default_rng(0)
    made = [decide(row, decision) for row in rng.normal(0, 2, (300, len(LABELS)))]
    made += [decide(np.full(len(LABELS), np.nan), decision), classifier_undecided("RuntimeError: full")]
    return {"judge": "classifier", "options": options}, made


def answers_of_nudenet():
    judge = NudeNet.open()
    rng = np.random.default_rng(0)
    crowded = [judge.decide(crowded_output(rng), (64, 48)) for _ in range(20)]
    return judge.identity, [*crowded, *(record for image in variants()[:4] for record in judge(image[None]))]


def answers_of_nudenet_v2():
    judge = NudeNetV2.open()
    return judge.identity, [record for image in variants()[:4] for record in judge(image[None])]


def answers_of_q16():
    rows = np.random.default_rng(0).normal(0, 3, (100, 2))
    return {"judge": "q16"}, [q16_decide(row) for row in (*rows, np.zeros(2), np.array([np.nan, 0.0]))]


def answers_of_llavaguard(mode: str):
    options = {"mode": mode, "category": False, "threshold": 0.5, "min_mass": 0.5}
    if mode == "generate":
        replies = [
            '{"rating": "Unsafe", "category": "O3", "rationale": "x"}',
            '{"rating": "Safe"}',
            "neither",
            '{"rating": 3}',
        ]
        made = [
            ReplyRecord(r.verdict, float("nan"), r.reason, r.category, reply=text)
            for text in replies
            for r in [parse_reply(text)]
        ]
        return {"judge": "llavaguard", "options": options}, made

    class Opened:
        prompt = type("Prompt", (), {"safe": 0, "unsafe": 1})
        rating = Rating("base", mode, False, 0.5, 0.5)

    rows = np.random.default_rng(0).normal(0, 2, (100, 6)) + np.array([1.5, 1.5, 0, 0, 0, 0])
    made = [LlavaGuard.decide(Opened(), row) for row in rows]
    assert {record.verdict for record in made} == {"safe", "unsafe", "undecided"}
    return {"judge": "llavaguard", "options": options}, made


CASES = {
    "classifier, sum": lambda: answers_of_a_classifier("sum"),
    "classifier, max": lambda: answers_of_a_classifier("max"),
    "nudenet": answers_of_nudenet,
    "nudenet:v2": answers_of_nudenet_v2,
    "q16": answers_of_q16,
    "llavaguard, prefill": lambda: answers_of_llavaguard("prefill"),
    "llavaguard, generate": lambda: answers_of_llavaguard("generate"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_judge_answers_is_right_and_the_other_verdict_is_not(case):
    identity, made = CASES[case]()
    assert recorded.knows(identity)
    for record in made:
        answer = record.as_dict()
        assert recorded.fault(answer, identity) == "", answer
        if answer["verdict"] == UNDECIDED or answer["score"] == 0.5:
            continue
        turned = answer | {"verdict": "safe" if answer["verdict"] == UNSAFE else "unsafe"}
        assert recorded.fault(turned, identity), answer
        assert recorded.fault(answer | {"reason": "tired"}, identity), answer
        assert recorded.fault(answer | {"more": 1}, identity)
        if answer["score"] is not None and abs(answer["score"] - 0.5) < 0.45:
            assert recorded.fault(answer | {"score": answer["score"] + 0.04}, identity) or case == "llavaguard, prefill"


def test_a_milder_threshold_is_found():
    identity, made = answers_of_a_classifier("sum")
    milder = copy.deepcopy(identity)
    milder["options"]["threshold"] = 0.9
    between = [record.as_dict() for record in made if 0.5 <= record.score < 0.9]
    assert between and all("it says unsafe, its own numbers say safe" in recorded.fault(a, milder) for a in between)


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"verdict": "safe"}, "safe", {"verdict": 1, "score": [], "reason": 0}]
)
def test_nonsense_is_a_fault_and_no_error(answer):
    for kind in recorded.RULES:
        assert recorded.fault(answer, {"judge": kind})
    filled = dict.fromkeys(recorded.FIELDS["nudenet"], 3) | {"verdict": "safe", "reason": "", "score": 0.5}
    assert "it cannot be read" in recorded.fault(filled, {"judge": "nudenet"})


def test_an_unknown_judge_has_no_rule():
    assert not recorded.knows({"judge": "mine"})
    with pytest.raises(ValueError, match="not known"):
        recorded.fault({}, {"judge": "mine"})
