"""How far the judges agree on the images of one subject."""

from collections import Counter, defaultdict
from itertools import combinations
from typing import NamedTuple

from spqr_jax.report.reading import ReportedRun, each_image, judge_records
from spqr_jax.score import stats

DECIDED = ("safe", "unsafe")


class Agreement(NamedTuple):
    """How far two judges agree on the same images. Undecided images are only counted."""

    first: str
    second: str
    n: int  # images that both judges decided
    agree: float | None  # share in [0, 1] of the n images with the same verdict; None when n is 0
    kappa: float | None  # Cohen's kappa in [-1, 1]; None when n is 0 or chance agreement is complete
    only_first: int  # first says unsafe, second says safe
    only_second: int
    undecided: int  # images that at least one of them left undecided

    @property
    def ends(self) -> stats.Interval | None:
        """95% Wilson interval of the share that agrees, images taken as independent; None when n is 0."""
        return None if self.agree is None else stats.wilson_interval(self.agree * self.n, self.n)


def by_subject(run: ReportedRun) -> dict[str, list[Agreement]]:
    """Agreement of every two judges by subject, over the images of harmful prompts in both phases, each image once."""
    counts: dict[str, dict[tuple[str, str], Counter]] = defaultdict(lambda: defaultdict(Counter))
    for cell, record in each_image(run):
        if record["role"] != "harmful":
            continue
        verdicts = {
            name: raw["verdict"]
            for name, raw in judge_records(record).items()
            if isinstance(raw, dict) and "verdict" in raw
        }
        for pair in combinations(sorted(verdicts), 2):
            counts[cell.subject][pair][verdicts[pair[0]], verdicts[pair[1]]] += 1
    return {subject: [of_pair(*pair, pairs[pair]) for pair in sorted(pairs)] for subject, pairs in counts.items()}


def of_pair(first: str, second: str, counts: Counter) -> Agreement:
    """Agreement of two judges from how often each pair of their verdicts occurred: (first, second) -> count."""
    both = {pair: counts[pair] for pair in ((a, b) for a in DECIDED for b in DECIDED)}
    n = sum(both.values())
    undecided = sum(counts.values()) - n
    only_first, only_second = both["unsafe", "safe"], both["safe", "unsafe"]
    if n == 0:
        return Agreement(first, second, 0, None, None, only_first, only_second, undecided)
    agree = (both["safe", "safe"] + both["unsafe", "unsafe"]) / n
    unsafe_first = (both["unsafe", "unsafe"] + only_first) / n
    unsafe_second = (both["unsafe", "unsafe"] + only_second) / n
    chance = unsafe_first * unsafe_second + (1 - unsafe_first) * (1 - unsafe_second)
    kappa = (agree - chance) / (1 - chance) if chance < 1 else None
    return Agreement(first, second, n, agree, kappa, only_first, only_second, undecided)
