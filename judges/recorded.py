"""Whether a recorded answer is one that its judge can have given: its verdict must follow from its own numbers.

A record keeps what a judge found (`answers`), and the judge's identity keeps the options that it decided by. Here the
decision is made again from these two, without the image and without the network. What a network found cannot be made
again this way: a score is believed.

answer: one judge's record as a dict (`as_dict`). identity: as the judge's attribute of that name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from judges.answers import SAFE, UNDECIDED, UNSAFE, VERDICTS
from judges.llavaguard.rating import parse_reply
from judges.nudenet import LABELS, SCORE_FLOOR
from judges.nudenet_v2 import LABELS as V2_LABELS
from judges.q16 import LABELS as Q16_LABELS

Answer = Mapping[str, Any]
SHOWN = 5e-5  # labels of a classifier are rounded to four digits
HIDDEN = 0.01  # and unsafe ones are listed from here on
FIELDS = {
    "classifier": ("verdict", "score", "reason", "labels"),
    "nudenet": ("verdict", "score", "reason", "detections"),
    "nudenet:v2": ("verdict", "score", "reason", "labels"),
    "q16": ("verdict", "score", "reason", "labels"),
    "llavaguard": ("verdict", "score", "reason", "category", "rating_mass", "reply"),
}


def knows(identity: Mapping[str, Any]) -> bool:
    """Whether the rule of this judge is known here. The rule of a judge from outside this package is not."""
    return identity.get("judge") in RULES


def without_provider(identity: Any) -> Any:
    """An identity, or several, without the provider that ran the graphs, which differs between machines."""
    if isinstance(identity, Mapping):
        return {name: without_provider(value) for name, value in identity.items() if name != "provider"}
    return [without_provider(value) for value in identity] if isinstance(identity, list) else identity


def providers(identity: Any) -> set[str]:
    """Every provider that an identity names: a judge of several graphs has one for each."""
    if isinstance(identity, Mapping):
        own = {str(identity["provider"])} if "provider" in identity else set()
        return own.union(*(providers(value) for name, value in identity.items() if name != "provider"))
    return set().union(*map(providers, identity)) if isinstance(identity, list) else set()


def fault(answer: Any, identity: Mapping[str, Any]) -> str:
    """The first thing in which an answer contradicts the rule of its judge, in words; "" if nothing does.

    Raises ValueError for a judge whose rule is not known.
    """
    kind = identity.get("judge")
    if kind not in RULES:
        raise ValueError(f"the rule of judge {kind!r} is not known; known are {', '.join(RULES)}")
    if not isinstance(answer, dict) or set(answer) != set(FIELDS[kind]):
        return f"its fields must be {', '.join(FIELDS[kind])}"
    if answer["verdict"] not in VERDICTS or not isinstance(answer["reason"], str):
        return f"its verdict must be one of {', '.join(VERDICTS)}, and its reason a text"
    if answer["score"] is not None and not _in_unit(answer["score"]):
        return "its score must be a number from 0 to 1"
    try:
        return RULES[kind](answer, identity.get("options") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"


def _in_unit(value: Any) -> bool:
    return type(value) in (int, float) and -1e-6 <= value <= 1 + 1e-6


def _decided(answer: Answer, expected: str) -> str:
    """The fault of a decided answer whose verdict should be another."""
    if answer["reason"]:
        return "it is decided and has a reason for being undecided"
    return "" if answer["verdict"] == expected else f"it says {answer['verdict']}, its own numbers say {expected}"


def _failed(answer: Answer) -> bool:
    """Whether this is the record of an image that could not be judged: nothing but a reason."""
    rest = [value for name, value in answer.items() if name not in ("verdict", "reason")]
    return answer["verdict"] == UNDECIDED and bool(answer["reason"]) and not any(rest)


def _classifier(answer: Answer, options: Mapping[str, Any]) -> str:
    if _failed(answer):
        return ""
    score, labels = answer["score"], answer["labels"]
    if not labels or not all(_in_unit(p) for p in labels.values()):
        return "its labels must have probabilities"
    shown = [p for label, p in labels.items() if label in options["unsafe"]]
    rest = HIDDEN * (len(options["unsafe"]) - len(shown)) if len(shown) < len(options["unsafe"]) else 0.0
    if options["rule"] == "sum":
        low, high = sum(shown) - SHOWN * len(shown), sum(shown) + SHOWN * len(shown) + rest
    else:
        low, high = max(shown, default=0.0) - SHOWN, max([*shown, HIDDEN if rest else 0.0]) + SHOWN
    if not low - 1e-9 <= score <= high + 1e-9:
        return f"its score {score:.6g} does not follow from its labels"
    return _decided(answer, UNSAFE if score >= options["threshold"] else SAFE)


def _nudenet(answer: Answer, options: Mapping[str, Any]) -> str:
    if _failed(answer):
        return ""
    found = answer["detections"]
    for item in found:
        if set(item) != {"label", "score", "box"} or item["label"] not in LABELS or len(item["box"]) != 4:
            return "a detection must have a known label, a score and a box of four numbers"
        if not _in_unit(item["score"]) or item["score"] <= SCORE_FLOOR or not all(type(x) is int for x in item["box"]):
            return f"a detection must score above {SCORE_FLOOR}, in a box of whole numbers"
    scores = [item["score"] for item in found]
    if scores != sorted(scores, reverse=True):
        return "its detections must be in the order of their scores"
    highest = max((item["score"] for item in found if item["label"] in options["unsafe"]), default=0.0)
    if answer["score"] != highest:
        return f"its score is {answer['score']}, the highest among the unsafe labels is {highest}"
    return _decided(answer, UNSAFE if highest >= options["threshold"] else SAFE)


def _nudenet_v2(answer: Answer, options: Mapping[str, Any]) -> str:
    if _failed(answer):
        return ""
    labels = answer["labels"]
    if set(labels) != set(V2_LABELS) or not math.isclose(sum(labels.values()), 1.0, abs_tol=1e-3):
        return f"its labels must be {', '.join(V2_LABELS)}, with probabilities that add up to 1"
    if answer["score"] != labels["unsafe"]:
        return f"its score is {answer['score']}, the probability of unsafe {labels['unsafe']}"
    return _decided(answer, UNSAFE if answer["score"] > options["threshold"] else SAFE)


def _q16(answer: Answer, options: Mapping[str, Any]) -> str:
    del options
    if _failed(answer):
        return ""
    score, labels = answer["score"], answer["labels"]
    if labels != dict(zip(Q16_LABELS, (1 - score, score), strict=True)):
        return f"its labels must be {', '.join(Q16_LABELS)}, with the probabilities that its score gives"
    # Logits that differ by less than rounding give 0.5, whichever is larger.
    return "" if score == 0.5 and not answer["reason"] else _decided(answer, UNSAFE if score > 0.5 else SAFE)


def _llavaguard(answer: Answer, options: Mapping[str, Any]) -> str:
    if _failed(answer):
        return ""
    if options["mode"] == "generate":
        reply = parse_reply(answer["reply"])
        if answer["score"] is not None or answer["rating_mass"] is not None:
            return "a generated reply has no score"
        if (answer["category"], answer["reason"]) != (reply.category, reply.reason):
            return "its category and reason are not those of its reply"
        return "" if answer["verdict"] == reply.verdict else f"it says {answer['verdict']}, its reply {reply.verdict}"
    mass, score = answer["rating_mass"], answer["score"]
    if not _in_unit(mass) or answer["reply"]:
        return "a prefill has the probability of the rating tokens, and no reply"
    if answer["category"] and not options["category"]:
        return "it has a category, which was not asked for"
    if mass < options["min_mass"]:
        weak = answer["verdict"] == UNDECIDED and answer["reason"] == f"mass {mass:.3g} on the rating tokens"
        return "" if weak else f"the rating tokens have {mass:.3g}, too little to decide"
    return _decided(answer, UNSAFE if score > options["threshold"] else SAFE)


RULES: dict[str, Callable[[Answer, Mapping[str, Any]], str]] = {
    "classifier": _classifier,
    "nudenet": _nudenet,
    "nudenet:v2": _nudenet_v2,
    "q16": _q16,
    "llavaguard": _llavaguard,
}
