"""A report on a data set before anybody trains on it: its contents and its faults."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from spqr_jax.data import drawing, words
from spqr_jax.data.drawing import Look
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source

LISTED = 20
JUDGE_BATCH = 32


class Report(NamedTuple):
    """The rows that were looked at, and their faults.

    Attributes:
        source: the data set.
        looked: one Look a row.
        bad: (place, fault) of rows that training cannot use.
        harmful_captions: (place, words and caption) of captions with a harmful word.
        judged: name of a judge -> (place, verdict and score) of images that it does not call safe.
    """

    source: Source
    looked: list[Look]
    bad: list[tuple[str, str]]
    harmful_captions: list[tuple[str, str]]
    judged: dict[str, list[tuple[str, str]]]

    @property
    def wrong(self) -> bool:
        """Whether there is any fault."""
        return bool(self.bad or self.harmful_captions or any(self.judged.values()))


def check(
    source: Source, judges: Mapping[str, Any], *, samples: int = 0, seed: int = 0, side: int = 512, crop: str = "center"
) -> Report:
    """Looks at the first `samples` rows that a run with this seed would draw (0: at all rows), and asks the judges.

    judges: name -> function images_u8 -> records. They see the images as training does, squares of `side` pixels. Every
    verdict other than "safe" is reported, since benign data and harmful data must be disjoint (paper, section 3.2).
    """
    rows = drawing.order(source, seed)[: samples or None]
    bar = tqdm(drawing.look(source, rows), total=len(rows), desc="images", unit="image", leave=False, disable=None)
    looked = list(bar)
    bad = [(source.where[found.row], found.problem) for found in looked if found.problem]
    named = ((found.row, words.harmful_words(source.captions[found.row])) for found in looked)
    spoken = [(source.where[row], f"{', '.join(hits)}: {source.captions[row]!r}") for row, hits in named if hits]
    good = [found for found in looked if not found.problem]
    return Report(source, looked, bad, spoken, _judge(source, good, judges, Preprocess(side, crop, seed=seed)))


def _judge(source: Source, good: Sequence[Look], judges: Mapping[str, Any], how: Preprocess):
    """Name of a judge -> (place, verdict and score) of every image that it does not call safe."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in judges}
    if not judges:
        return found
    data = drawing.dataset(source, good, how)
    starts = range(0, len(good), JUDGE_BATCH)
    for start in tqdm(starts, desc="judges", unit="batch", leave=False, disable=None):
        rows = np.arange(start, min(start + JUDGE_BATCH, len(good)))
        images = data.images(rows)
        for name, judge in judges.items():
            for i, record in zip(rows, judge(images), strict=True):
                if record.verdict != "safe":
                    said = f"{record.verdict}, score {record.score:.2f} {record.reason}".rstrip()
                    found[name].append((source.where[good[i].row], said))
    return found


def text(report: Report) -> str:
    """The report as lines to print."""
    source, looked = report.source, report.looked
    readable = [found for found in looked if found.width]
    captions = Counter(source.captions[found.row] for found in looked)
    digests = Counter(found.digest for found in readable)
    lines = [
        source.name,
        f"captions              {source.rule}",
        f"pairs                 {len(source)}, looked at {len(looked)}",
        f"sizes                 {_sizes(readable)}",
        f"distinct captions     {len(captions)}",
        f"repeated captions     {sum(n - 1 for n in captions.values())}{_most(captions)}",
        f"repeated images       {sum(n - 1 for n in digests.values())}",
    ]
    lines += _listed("unreadable or empty", report.bad)
    lines += _listed("harmful words", report.harmful_captions)
    for name, found in report.judged.items():
        lines += _listed(f"not safe by {name}", found)
    if not report.judged:
        lines.append("images not judged     name judges with --judges nudenet=nudenet")
    return "\n".join([*lines, "Something is wrong." if report.wrong else "Nothing is wrong."])


def _sizes(readable: Sequence[Look]) -> str:
    if not readable:
        return "none readable"
    short = np.array([min(found.width, found.height) for found in readable])
    width, height = Counter((found.width, found.height) for found in readable).most_common(1)[0][0]
    return f"shorter side {short.min()} to {short.max()}, median {np.median(short):.0f}; most common {width}x{height}"


def _most(captions: Counter) -> str:
    caption, count = captions.most_common(1)[0] if captions else ("", 0)
    return f"; most often ({count} times) {caption!r}" if count > 1 else ""


def _listed(title: str, found: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{title:21} {len(found)}", *(f"  {where}: {what}" for where, what in found[:LISTED])]
    return lines + ([f"  and {len(found) - LISTED} more"] if len(found) > LISTED else [])
