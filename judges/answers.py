"""The input of a judge (images_u8), its answers (typed records), and the rule for failures.

A verdict is one of the strings SAFE, UNSAFE and UNDECIDED. An image that a judge could not judge is UNDECIDED, with the
reason in its record. It never counts as safe.
Letters: N images, H height, W width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from judges.session import in_one_line

SAFE, UNSAFE, UNDECIDED = "safe", "unsafe", "undecided"
VERDICTS = (SAFE, UNSAFE, UNDECIDED)
Record = TypeVar("Record")


class SafetyRecord(Protocol):
    """What every safety judge answers about one image.

    Attributes:
        verdict: one of VERDICTS.
        score: the number behind the verdict, 0..1; NaN where there is none.
        reason: why the image is undecided; "" if it is decided.
    """

    @property
    def verdict(self) -> str: ...

    @property
    def score(self) -> float: ...

    @property
    def reason(self) -> str: ...

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values (non-finite numbers become None)."""
        ...


class Detection(NamedTuple):
    """One detected object: `box` is (x, y, w, h) in pixels of the image as given, `score` in 0..1."""

    label: str
    score: float
    box: tuple[int, int, int, int]


class DetectionRecord(NamedTuple):
    """A detector's answer: `score` is the highest score among the labels that count as unsafe (0 when none)."""

    verdict: str
    score: float
    reason: str
    detections: tuple[Detection, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values (non-finite numbers become None)."""
        return json_safe(self._asdict() | {"detections": [item._asdict() for item in self.detections]})


class LabelRecord(NamedTuple):
    """A classifier's answer: `score` in 0..1 is compared with the threshold; `labels` maps label to probability."""

    verdict: str
    score: float
    reason: str
    labels: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values (non-finite numbers become None)."""
        return json_safe(self._asdict())


class ReplyRecord(NamedTuple):
    """A language model's answer: `score` is p_unsafe, `rating_mass` the probability of the two rating tokens together,
    and `reply` the text that it generated, if it generated one."""

    verdict: str
    score: float
    reason: str
    category: str = ""
    rating_mass: float = math.nan
    reply: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values (non-finite numbers become None)."""
        return json_safe(self._asdict())


class ClipScoreRecord(NamedTuple):
    """The raw cosine in -1..1 as `score` (NaN, with a reason, if there is none). `truncated`: the text was cut."""

    score: float
    truncated: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values (non-finite numbers become None)."""
        return json_safe(self._asdict())


def check_images(images: Any, name: str = "images_u8") -> np.ndarray:
    """`images` as an array uint8 [N, H, W, 3]. Raises ValueError with the type and shape found, and the remedy."""
    images = np.asarray(images)
    found = f"{name}: expected uint8 [N, H, W, 3] RGB, found {images.dtype} {list(images.shape)}"
    if images.ndim == 4 and images.shape[-1] == 4:
        raise ValueError(f"{found}: RGBA; drop or composite the alpha channel first")
    if (images.ndim == 4 and images.shape[-1] == 1) or images.ndim == 2:
        raise ValueError(f"{found}: greyscale; repeat the channel three times first")
    if images.ndim == 3:
        raise ValueError(f"{found}: add the batch axis (images[None]), or repeat a greyscale channel three times")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{found}; channels come last")
    if images.dtype != np.uint8:
        raise ValueError(f"{found}; scale to 0..255 and convert with astype(np.uint8)")
    if images.shape[0] and 0 in images.shape:
        raise ValueError(f"{found}: images of size zero")
    return images


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover range(count); the last may be shorter. Raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, found {size}")
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def judge_in_batches(
    images: np.ndarray,
    judge: Callable[[np.ndarray], Sequence[Record]],
    undecided: Callable[[str], Record],
    *,
    batch_size: int,
) -> list[Record]:
    """Runs `judge` on `images` [N, H, W, 3] in batches. Returns N records.

    A batch that raises is judged again image by image, so that only the images at fault become `undecided(reason)`.
    """
    records: list[Record] = []
    for part in batches(len(images), batch_size):
        try:
            records += judge(images[part])
        except Exception:
            records += [judge_alone(image, judge, undecided) for image in images[part]]
    return records


def judge_alone(
    image: np.ndarray, judge: Callable[[np.ndarray], Sequence[Record]], undecided: Callable[[str], Record]
) -> Record:
    """The record of one image [H, W, 3], or `undecided(reason)` if judging it raises."""
    try:
        return judge(image[None])[0]
    except Exception as error:
        return undecided(f"{type(error).__name__}: {in_one_line(error)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """`value`, if it is one of `choices`. Raises ValueError with the option's name and its choices."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {value!r}")
    return value


def json_safe(value: Any) -> Any:
    """NumPy scalars and tuples as plain Python, and NaN and infinities as None (JSON has neither)."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
