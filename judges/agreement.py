"""Compares LlavaGuard's two modes, one prefill and a generated reply, on your own images.

    python -m judges.agreement GRAPHS --policy policy.txt IMAGE_OR_FOLDER... [--view anyres] [--out agreement.json]

Prints how often the two modes agree, Cohen's kappa, the images on which they differ, how many images each mode left
undecided, and the seconds that each mode takes per image.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from judges.answers import UNDECIDED, json_safe
from judges.combine import cohens_kappa
from judges.llavaguard import MODES, LlavaGuard
from judges.session import JudgeError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


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


def compare(judges: dict[str, LlavaGuard], paths: Sequence[Path]) -> dict[str, Any]:
    """Runs both modes on every image, one image at a time. Returns the comparison as a JSON-safe dict."""
    verdicts: dict[str, list[str]] = {mode: [] for mode in judges}
    seconds: dict[str, list[float]] = {mode: [] for mode in judges}
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        for mode, judge in judges.items():
            start = time.perf_counter()
            verdicts[mode].append(judge(image)[0].verdict)
            seconds[mode].append(time.perf_counter() - start)
    prefill, generate = MODES
    agreement = cohens_kappa(verdicts[prefill], verdicts[generate])
    pairs = [(str(paths[i]), verdicts[prefill][i], verdicts[generate][i]) for i in agreement.disagreements]
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    return json_safe(
        {
            "pictures": len(paths),
            "decided_by_both": agreement.n,
            "agreement": agreement.agreement,
            "kappa": agreement.kappa,
            "disagreements": pairs,
            "undecided": {mode: words.count(UNDECIDED) for mode, words in verdicts.items()},
            "median_seconds": medians,
            "speedup": medians[generate] / medians[prefill],
            "identity": {mode: judge.identity for mode, judge in judges.items()},
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1, with one line of explanation, if a judge or an image cannot be opened."""
    parser = argparse.ArgumentParser(prog="python -m judges.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("graphs", help="directory written by `python -m convert judges --kind llavaguard`")
    parser.add_argument("images", nargs="+", help="images or folders of images")
    parser.add_argument("--policy", required=True, help="LlavaGuard's policy text")
    parser.add_argument("--view", choices=("base", "anyres"), default="anyres")
    parser.add_argument("--providers", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="write the comparison as JSON")
    flags = parser.parse_args(argv)
    try:
        paths = image_paths(flags.images)
        options = {"policy": flags.policy, "view": flags.view, "providers": flags.providers}
        result = compare({mode: LlavaGuard.open(flags.graphs, mode=mode, **options) for mode in MODES}, paths)
    except (JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.out:
        Path(flags.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "identity"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
