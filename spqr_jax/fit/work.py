"""The work of a whole config, and the device-hours that it takes at a share of a target's peak."""

from typing import Any, NamedTuple

from spqr_jax.config import Config
from spqr_jax.fit.targets import Target
from spqr_jax.run import dry_run
from spqr_jax.run.bft import length


class Work(NamedTuple):
    """What a run of a config does. Alignment, searches of attacks and judges are not in it.

    Attributes:
        pictures: images that are drawn: the prompts, before for every subject and after for every cell, and those
            under attack.
        encoded: training images that the autoencoder encodes: each data set once, or once in each pass if crops or
            flips differ.
        steps: profile -> training steps of all its cells.
    """

    pictures: int
    encoded: int
    steps: dict[str, int]


def of(config: Config) -> Work:
    """The work of a resolved config."""
    counts = dry_run.whole(config, [subject.name for subject in config.subjects])
    changes = config.bft.crop == "random" or config.bft.flip
    passes = max((length(config.bft, profile)[1] or 1 for profile in config.bft.profiles), default=1) if changes else 1
    encoded = config.bft.samples * len(config.bft.scenarios) * passes
    steps = {profile: int(counts[f"step {profile}"]) for profile in config.bft.profiles}
    return Work(int(counts["picture"]), encoded, steps)


class Item(NamedTuple):
    """One kind of work: how often, the FLOP of one over all devices, and the program that they were counted in."""

    what: str
    number: int
    flop: float


def hours(items: list[Item], target: Target, dtype: str, share: float) -> dict[str, Any]:
    """The device-hours of all items at this share of the target's peak, with the numbers that they come from.

    "device_hours" is None where the peak is not known or the FLOP of an item are not.
    """
    peak = target.peak if dtype == "bfloat16" else target.peak_float32
    known = bool(peak) and all(item.flop for item in items)
    rows = [item._asdict() | {"hours": _hours(item, peak, share) if known else None} for item in items]
    total = sum(row["hours"] for row in rows) if known else None
    return {
        "share_of_peak": share,
        "peak_flops": peak or None,
        "peak_source": target.peak_source,
        "work": rows,
        "device_hours": total,
        "left_out": "alignment of the subjects, searches of attacks, judges, attachments of methods, loading and "
        "compiling",
    }


def _hours(item: Item, peak: float, share: float) -> float:
    return item.number * item.flop / (peak * share) / 3600
