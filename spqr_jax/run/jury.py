"""The judges of a run: opened once, asked about images, their answers ready for records."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from judges import clip_score, combine, inception, opening
from spqr_jax.config import Judges
from spqr_jax.run import names

# The judges of quality: a field of the config's section -> what opens it.
QUALITY: dict[str, Callable[..., Any]] = {
    "clip_score": clip_score.CLIPScore.open,
    "features": inception.Inception.open,
}


class Verdicts(NamedTuple):
    """Answers about N images: the combined verdict of each, and the raw records of all judges about it as JSON."""

    verdicts: list[str]
    judges: list[str]


class Jury(NamedTuple):
    """Safety judges by name, the rule that combines their verdicts, and the two judges of quality."""

    safety: dict[str, Any]
    rule: str
    clip: clip_score.CLIPScore
    features: inception.Inception

    def identities(self) -> dict[str, Any]:
        """Model, file hash and options of every judge, for the manifest and cell.json."""
        named = {**self.safety, "clip_score": self.clip, "features": self.features}
        return {name: judge.identity for name, judge in named.items()}

    def ask(self, images_u8: np.ndarray) -> Verdicts:
        """Ask every safety judge about every image."""
        records = {name: list(judge(images_u8)) for name, judge in self.safety.items()}
        verdicts = combine.combine(
            {name: [r.verdict for r in answers] for name, answers in records.items()}, rule=self.rule
        )
        raw = [
            json.dumps({name: answers[i].as_dict() for name, answers in records.items()}, sort_keys=True)
            for i in range(len(images_u8))
        ]
        return Verdicts(list(verdicts), raw)

    def clip_scores(self, images_u8: np.ndarray, texts: Sequence[str]) -> list[float]:
        """Raw cosines of images and their prompts; NaN where the judge failed."""
        return [float(record.score) for record in self.clip.score(images_u8, list(texts))]


class Opener(NamedTuple):
    """A judge before it is opened: its path, or its name where it finds its own files, and the function that opens it.

    `open` raises judges' JudgeError, and ValueError for a shipped judge that does not exist.
    """

    place: str
    open: Callable[[], Any]


def open_jury(config: Judges) -> Jury:
    """Open every judge, so that a missing file is known before any image is made. Raises as `Opener.open`."""
    return of_opened(config, {field: opener.open() for field, opener in openers(config).items()})


def of_opened(config: Judges, opened: Mapping[str, Any]) -> Jury:
    """The jury of opened judges, by the fields that `openers` gives."""
    safety = {name: opened[f"safety.{name}"] for name in config.safety}
    return Jury(safety, config.rule, opened["clip_score"], opened["features"])


def openers(config: Judges) -> dict[str, Opener]:
    """Field of the config's section, "safety.nudenet" -> its judge. Raises ValueError without a safety judge."""
    if not config.safety:
        raise ValueError("config.judges.safety is empty; name at least one safety judge.")
    found = {
        f"safety.{name}": Opener(opening.place_of(source), partial(open_safety, source, config.providers))
        for name, source in config.safety.items()
    }
    for field, judge in QUALITY.items():
        source = getattr(config, field)
        place, _ = opening.split_options(source)
        found[field] = Opener(place, partial(_open_quality, judge, source, config.providers))
    return found


def _open_quality(judge: Callable[..., Any], source: str, providers: str) -> Any:
    return opening.open_at(judge, located(source), providers=providers)


def open_safety(source: str, providers: str) -> opening.Judge:
    """Open one safety judge by the name that a config gives it: any that `judges.opening.open_safety` takes, or
    "mini:harm". Raises JudgeError, and ValueError for a shipped judge that does not exist."""
    return opening.open_safety(located(source), providers=providers)


def located(source: str) -> str:
    """A judge as the config names it, with the path of its file where it is "mini:...". Options after "?" stay."""
    name, mark, options = source.partition("?")
    return source if names.in_mini(name) is None else f"{names.judge_path(name)}{mark}{options}"
