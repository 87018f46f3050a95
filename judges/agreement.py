"""Compares safety judges, two or more, on your own images.

    python -m judges.agreement IMAGE_OR_FOLDER... --judges nudenet:v2 nudenet:strict5 [--out agreement.json]
    python -m judges.agreement IMAGE_OR_FOLDER... --judges llavaguard:GRAPHS 'llavaguard:GRAPHS?mode=generate'

Judges are written as in a config. Prints how many images each judge calls unsafe and leaves undecided, and the seconds
that it takes per image; and for every pair of judges on how many images they agree, Cohen's kappa, and the images on
which they differ. On harmless images this shows false alarms, and nothing about what a judge misses.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from judges.answers import UNSAFE, VERDICTS, SafetyRecord, json_safe
from judges.combine import cohens_kappa
from judges.opening import Judge, open_safety
from judges.session import JudgeError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
COUNTS = ("decided_by_both", "both_unsafe", "only_first_unsafe", "only_second_unsafe")  # fields of a pair of judges
SHARES = ("agreement", "kappa")


class Answers(NamedTuple):
    """One judge's records of all images, and the seconds that it took for each."""

    records: list[SafetyRecord]
    seconds: list[float]

    def verdicts(self) -> list[str]:
        """The verdict on each image."""
        return [record.verdict for record in self.records]


def image_paths(sources: Sequence[str]) -> list[Path]:
    """The image files among `sources`, and those in the folders among them, in the order of their names.

    Raises JudgeError if a source does not exist, or if there is no image.
    """
    paths = [Path(source) for source in sources]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise JudgeError(f"{missing[0]}: no such file or folder")
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    images = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not images:
        raise JudgeError(f"{', '.join(sources)}: no images ({', '.join(sorted(SUFFIXES))})")
    return images


def ask(judges: Mapping[str, Judge], paths: Sequence[Path]) -> dict[str, Answers]:
    """Shows every image to every judge, one image at a time. Raises OSError for a file that is no image."""
    answers = {name: Answers([], []) for name in judges}
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        for name, judge in judges.items():
            start = time.perf_counter()
            answers[name].records.append(judge(image)[0])
            answers[name].seconds.append(time.perf_counter() - start)
    return answers


def compare(judges: Mapping[str, Judge], paths: Sequence[Path]) -> dict[str, Any]:
    """The comparison of the judges on the images as JSON-safe values."""
    answers = ask(judges, paths)
    shown = {str(path): {name: answers[name].records[i].as_dict() for name in judges} for i, path in enumerate(paths)}
    of_judges = {
        name: {verdict: answers[name].verdicts().count(verdict) for verdict in VERDICTS}
        | {"median_seconds": statistics.median(answers[name].seconds), "identity": judge.identity}
        for name, judge in judges.items()
    }
    pairs = [pair(*names, answers, paths) for names in itertools.combinations(judges, 2)]
    return json_safe({"images": len(paths), "judges": of_judges, "pairs": pairs, "answers": shown})


def pair(first: str, second: str, answers: Mapping[str, Answers], paths: Sequence[Path]) -> dict[str, Any]:
    """The comparison of two judges: counts of images, agreement, kappa, and the images on which they differ."""
    votes = answers[first].verdicts(), answers[second].verdicts()
    found = cohens_kappa(*votes)
    only_first = sum(votes[0][i] == UNSAFE for i in found.disagreements)
    return {
        "first": first,
        "second": second,
        "decided_by_both": found.n,
        "both_unsafe": sum(set(verdicts) == {UNSAFE} for verdicts in zip(*votes, strict=True)),
        "only_first_unsafe": only_first,
        "only_second_unsafe": len(found.disagreements) - only_first,
        "agreement": found.agreement,
        "kappa": found.kappa,
        "disagreements": [str(paths[i]) for i in found.disagreements],
    }


def tables(result: Mapping[str, Any]) -> str:
    """The comparison as two tables in Markdown, and a line for each image on which two judges differ."""
    judges = [
        [name, *(counts[verdict] for verdict in VERDICTS), f"{counts['median_seconds']:.3g}"]
        for name, counts in result["judges"].items()
    ]
    pairs = [
        [
            f"{item['first']}, {item['second']}",
            *(item[name] for name in COUNTS),
            *(share(item[name]) for name in SHARES),
        ]
        for item in result["pairs"]
    ]
    differences = [
        f"{item['first']} and {item['second']} differ on {path}"
        for item in result["pairs"]
        for path in item["disagreements"]
    ]
    by_judge = table(["judge", *VERDICTS, "seconds per image"], judges)
    by_pair = table(["judges", *(name.replace("_", " ") for name in (*COUNTS, *SHARES))], pairs)
    return "\n".join([f"{result['images']} images", "", *by_judge, "", *by_pair, *differences])


def share(value: float | None) -> str:
    """Three digits, or the word for a number that is undefined."""
    return "undefined" if value is None else f"{value:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1, with one line of explanation, if a judge or an image cannot be opened."""
    parser = argparse.ArgumentParser(prog="python -m judges.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="images or folders of images")
    parser.add_argument("--judges", nargs="+", required=True, metavar="JUDGE", help="two or more, as in a config")
    parser.add_argument("--providers", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="write the comparison as JSON, with every answer")
    flags = parser.parse_args(argv)
    try:
        if len(set(flags.judges)) < 2:
            raise JudgeError(f"--judges: expected two different judges or more, found {' '.join(flags.judges)}")
        paths = image_paths(flags.images)
        result = compare({name: open_safety(name, providers=flags.providers) for name in flags.judges}, paths)
    except (JudgeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.out:
        Path(flags.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
