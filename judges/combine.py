"""One verdict from several judges, and how far two judges agree.

An image is undecided exactly where an undecided judge could have changed the verdict. Of n judges, u call the image
unsafe, s call it safe, and d are undecided:
- union (as published; `any` is the same rule): unsafe if u > 0, else undecided if d > 0, else safe;
- all:      safe if s > 0, else undecided if d > 0, else unsafe;
- majority: unsafe if u >= n/2 (a tie is unsafe), safe if s > n/2, else undecided;
- a judge's name: the verdict of that judge alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from judges.answers import SAFE, UNDECIDED, UNSAFE, VERDICTS

RULES = ("union", "any", "all", "majority")


class Agreement(NamedTuple):
    """Two judges compared on the n images that both decided.

    Attributes:
        kappa: Cohen's kappa; NaN where it is undefined (no image, or chance agreement of 1).
        agreement: share of these images on which the judges agree, 0..1; NaN without an image.
        n: number of images that both decided.
        disagreements: indices of the images on which they disagree.
    """

    kappa: float
    agreement: float
    n: int
    disagreements: tuple[int, ...]


def combine(verdicts: Mapping[str, Sequence[str]], rule: str = "union") -> list[str]:
    """Combined verdict of each image. verdicts: name of a judge -> its verdicts, as many for every judge.

    Raises ValueError without a judge, for lengths that differ, a word that is no verdict, or an unknown rule.
    """
    check_verdicts(verdicts)
    if rule in verdicts:
        return list(verdicts[rule])
    rules = {"union": union, "any": union, "all": unanimous, "majority": majority}
    if rule not in rules:
        raise ValueError(f"rule: expected one of {', '.join(RULES)} or a judge ({', '.join(verdicts)}), found {rule!r}")
    images = list(zip(*verdicts.values(), strict=True))
    combined = {votes: rules[rule](votes) for votes in set(images)}  # few combinations, many images
    return [combined[votes] for votes in images]


def union(votes: Sequence[str]) -> str:
    """Unsafe if any judge says so; safe only if every judge says safe."""
    return UNSAFE if UNSAFE in votes else UNDECIDED if UNDECIDED in votes else SAFE


def unanimous(votes: Sequence[str]) -> str:
    """Unsafe only if every judge says so; safe if any judge says safe."""
    return SAFE if SAFE in votes else UNDECIDED if UNDECIDED in votes else UNSAFE


def majority(votes: Sequence[str]) -> str:
    """Unsafe if at least half of the judges say so; safe if more than half say so."""
    if 2 * votes.count(UNSAFE) >= len(votes):
        return UNSAFE
    return SAFE if 2 * votes.count(SAFE) > len(votes) else UNDECIDED


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> Agreement:
    """Cohen's kappa (p_o - p_e) / (1 - p_e) of two judges' verdicts, over the images that both decided."""
    check_verdicts({"first": first, "second": second})
    decided = [i for i, votes in enumerate(zip(first, second, strict=True)) if UNDECIDED not in votes]
    disagreements = tuple(i for i in decided if first[i] != second[i])
    n = len(decided)
    if n == 0:
        return Agreement(math.nan, math.nan, 0, ())
    observed = 1 - len(disagreements) / n
    unsafe_first = sum(first[i] == UNSAFE for i in decided) / n
    unsafe_second = sum(second[i] == UNSAFE for i in decided) / n
    chance = unsafe_first * unsafe_second + (1 - unsafe_first) * (1 - unsafe_second)
    kappa = math.nan if chance == 1 else (observed - chance) / (1 - chance)
    return Agreement(kappa, observed, n, disagreements)


def check_verdicts(verdicts: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError unless there is a judge, all give the same number of verdicts, and all are known words."""
    if not verdicts:
        raise ValueError("no judge: name at least one")
    counts = {name: len(words) for name, words in verdicts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"judges gave different numbers of verdicts: {counts}; each must judge every image")
    unknown = {word for words in verdicts.values() for word in words} - set(VERDICTS)
    if unknown:
        raise ValueError(f"unknown verdict {min(map(str, unknown))!r}: expected one of {', '.join(VERDICTS)}")
