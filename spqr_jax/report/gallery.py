"""The gallery: images before and after fine-tuning as thumbnails, with what each judge answered.

A group is one prompt and one initial noise. In it every subject has a strip: its image before benign fine-tuning, then
one image after it for each cell. Half of the groups are prompts whose verdict changed. The other half is drawn by a
hash of the key alone, so that this sample does not depend on the results. The contents of records are not trusted: the
path of an image that leaves the directory of its cell is refused, and thumbnails are encoded again and named by a hash.
"""

import base64
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from spqr_jax.files.layout import ReportFolder
from spqr_jax.report.reading import PairKey, ReportedRun, judge_records, key_of, profile_order
from spqr_jax.score.cells import FinishedCell

THUMBNAIL = 256  # longest edge in pixels
RAW_OUTPUT = 1500  # characters of one image's judge records that the page carries


class Thumbnail(NamedTuple):
    """A small copy of an image, encoded."""

    data: bytes
    suffix: str  # "png" or "jpg"
    small: bool  # fewer pixels than the page shows: enlarge without smoothing


class Tile(NamedTuple):
    """One image with its verdict."""

    phase: str
    profile: str  # "" before fine-tuning: the image belongs to every profile
    scenario: str
    seed: int | None
    verdict: str
    became_unsafe: bool
    clip: float | None
    raw: str  # the judges' records as JSON
    picture: Thumbnail | None
    missing: str  # why there is no image
    veiled: bool  # blurred until the reader asks for it


class Strip(NamedTuple):
    """The images of one subject in a group."""

    subject: str
    tiles: list[Tile]


class Group(NamedTuple):
    """One prompt with one initial noise, and the images of every subject."""

    key: PairKey
    prompt: str
    category: str
    language: str
    changed: bool
    why: str
    strips: list[Strip]


class Gallery(NamedTuple):
    """The groups that are shown, and counts over all records."""

    groups: list[Group]
    n_prompts: int  # (prompt, sample) pairs in the records
    n_changed: int  # those whose verdict differs between before and after in at least one cell
    unpaired: int  # images after fine-tuning without a partner before


class Outcome(NamedTuple):
    """What happened to one prompt over all cells."""

    category: str
    lost: int  # cells in which safe became unsafe
    changed: int  # cells in which the verdict changed at all
    unpaired: int


def build(run: ReportedRun, *, prompts: int = 48) -> Gallery:
    """Choose at most `prompts` groups and read their images."""
    outcomes = survey(run)
    chosen = choose(outcomes, prompts)
    records = _collect(run, set(chosen))
    groups = [_group(run, key, why, outcomes[key], records[key]) for key, why in chosen.items()]
    n_changed = sum(outcome.changed > 0 for outcome in outcomes.values())
    return Gallery(groups, len(outcomes), n_changed, sum(outcome.unpaired for outcome in outcomes.values()))


def survey(run: ReportedRun) -> dict[PairKey, Outcome]:
    """Outcome of every (prompt, sample) in the records."""
    found: dict[PairKey, Outcome] = {}
    for cell in run.cells:
        rows = run.records_of(cell)
        before = {key_of(row): row["verdict"] for row in rows if row["phase"] == "before"}
        for row in rows:
            if row["phase"] != "after":
                continue
            key = key_of(row)
            old = found.get(key, Outcome(row["category"] or "", 0, 0, 0))
            was, now = before.get(key), row["verdict"]
            found[key] = old._replace(
                lost=old.lost + ((was, now) == ("safe", "unsafe")),
                changed=old.changed + (was is not None and was != now),
                unpaired=old.unpaired + (was is None),
            )
    return found


def choose(outcomes: dict[PairKey, Outcome], prompts: int) -> dict[PairKey, str]:
    """Which groups are shown: key -> why.

    Half are groups whose verdict changed, harmful prompts and those that changed in most cells first. A quarter is a
    sample of harmful prompts, a quarter one of benign prompts. Samples are in the order of a hash of the key and take
    categories in turn. No prompt is shown with two noises.
    """
    order = sorted(outcomes, key=_digest)
    changed = sorted(
        (key for key in order if outcomes[key].changed),
        key=lambda key: (key.role != "harmful", -outcomes[key].lost, -outcomes[key].changed),
    )
    shares = {"harmful": prompts // 4, "benign": prompts // 4}
    shares["changed"] = prompts - sum(shares.values())
    chosen: dict[PairKey, str] = {}
    _take(chosen, changed, shares["changed"], "verdict changed")
    for role in ("harmful", "benign"):
        pool = [key for key in order if key.role == role]
        _take(chosen, _in_turn(pool, outcomes), shares[role], "sample")
    return chosen


def thumbnail(path: Path) -> Thumbnail:
    """A copy of an image: a PNG in its size up to half of THUMBNAIL pixels, else a JPEG of at most THUMBNAIL pixels.

    Raises OSError for a file that is not a readable image.
    """
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            picture = image.convert("RGB")
    except FileNotFoundError:
        raise OSError("picture not found") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        # Pillow's own messages hold absolute paths, which have no place in a report that is passed on.
        raise OSError("not a readable picture") from None
    out = io.BytesIO()
    if max(picture.size) <= THUMBNAIL // 2:
        picture.save(out, "PNG", optimize=True)
        return Thumbnail(out.getvalue(), "png", small=True)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(out, "JPEG", quality=85)
    return Thumbnail(out.getvalue(), "jpg", small=False)


def picture_bytes(gallery: Gallery) -> int:
    """Size of all thumbnails."""
    tiles = (tile for group in gallery.groups for strip in group.strips for tile in strip.tiles)
    return sum(len(tile.picture.data) for tile in tiles if tile.picture)


def fewer(gallery: Gallery, n: int) -> Gallery:
    """The gallery with n of its groups, evenly spaced, so that changed verdicts and samples stay in proportion."""
    total = len(gallery.groups)
    return gallery._replace(groups=[gallery.groups[(2 * i + 1) * total // (2 * n)] for i in range(n)])


def data_uri(picture: Thumbnail) -> str:
    """The thumbnail as a data URI, which puts it inside the page."""
    kind = "jpeg" if picture.suffix == "jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture.data).decode()}"


def beside(report: ReportFolder) -> Callable[[Thumbnail], str]:
    """A function that writes an image beside the page, named by its content, and returns its path from the page."""

    def store(picture: Thumbnail) -> str:
        path = report.thumbs / f"{hashlib.sha256(picture.data).hexdigest()[:20]}.{picture.suffix}"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(picture.data)
        return path.relative_to(report.path).as_posix()

    return store


def _take(chosen: dict[PairKey, str], pool: Iterable[PairKey], most: int, why: str) -> None:
    taken = 0
    seen = {key[:3] for key in chosen}
    for key in pool:
        if taken == most:
            return
        if key[:3] not in seen:
            seen.add(key[:3])
            chosen[key] = why
            taken += 1


def _in_turn(keys: list[PairKey], outcomes: dict[PairKey, Outcome]) -> list[PairKey]:
    """One key of every category, then a second of every category, and so on."""
    places: dict[str, int] = defaultdict(int)
    turns = []
    for key in keys:
        category = outcomes[key].category
        turns.append((places[category], category, key))
        places[category] += 1
    return [key for _, _, key in sorted(turns, key=lambda turn: turn[:2])]


def _digest(key: PairKey) -> str:
    return hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()


def _collect(run: ReportedRun, keys: set[PairKey]) -> dict[PairKey, list[tuple[FinishedCell, dict[str, Any]]]]:
    """Records of the chosen keys, with the cell each is in."""
    found: dict[PairKey, list[tuple[FinishedCell, dict[str, Any]]]] = defaultdict(list)
    for cell in run.cells:
        for row in run.records_of(cell):
            if key_of(row) in keys:
                found[key_of(row)].append((cell, row))
    return found


def _group(run: ReportedRun, key: PairKey, why: str, outcome: Outcome, rows: list[tuple[FinishedCell, dict]]) -> Group:
    strips = []
    for subject in run.subjects:
        own = [(cell, row) for cell, row in rows if cell.subject == subject]
        if own:
            strips.append(Strip(subject, _tiles(run, own)))
    record = rows[0][1]
    language = record.get("language") or ""
    return Group(key, record["prompt"], record["category"] or "", language, outcome.changed > 0, why, strips)


def _tiles(run: ReportedRun, own: list[tuple[FinishedCell, dict]]) -> list[Tile]:
    """The image before, which the cells of a subject share, then one image after for every cell."""
    before = next(((cell, row) for cell, row in own if row["phase"] == "before"), None)
    verdicts = {cell.name: row["verdict"] for cell, row in own if row["phase"] == "before"}

    scenarios = {scenario: i for i, scenario in enumerate(run.scenarios)}

    def place(pair: tuple[FinishedCell, dict]) -> tuple:
        cell = pair[0]
        return scenarios.get(cell.scenario, len(scenarios)), profile_order(cell.profile), cell.seed

    after = sorted(((cell, row) for cell, row in own if row["phase"] == "after"), key=place)
    several = len({cell.seed for cell, _ in after}) > 1
    tiles = [_tile(*before, was=None, seed=None)] if before else []
    return tiles + [
        _tile(cell, row, was=verdicts.get(cell.name), seed=cell.seed if several else None) for cell, row in after
    ]


def _tile(cell: FinishedCell, row: dict[str, Any], *, was: str | None, seed: int | None) -> Tile:
    picture, missing = None, ""
    try:
        picture = thumbnail(_inside(cell.folder.path, row["image"]))
    except OSError as error:
        missing = str(error)
    after, clip = row["phase"] == "after", row.get("clip_score")
    return Tile(
        phase=row["phase"],
        profile=cell.profile if after else "",
        scenario=cell.scenario if after else "",
        seed=seed,
        verdict=row["verdict"] or "undecided",
        became_unsafe=(was, row["verdict"]) == ("safe", "unsafe"),
        clip=clip if clip is not None and clip == clip else None,  # NaN: not computed
        raw=_raw(row),
        picture=picture,
        missing=missing,
        veiled=row["role"] == "harmful" or row["verdict"] != "safe",
    )


def _inside(directory: Path, image: str | None) -> Path:
    """The path of an image. Raises OSError if it would leave the directory of its cell."""
    path = directory / (image or "")
    if not image or not path.resolve().is_relative_to(directory.resolve()):
        raise OSError("the recorded path leaves the cell directory: refused")
    return path


def _raw(row: dict[str, Any]) -> str:
    text = json.dumps(judge_records(row), ensure_ascii=False)
    return text if len(text) <= RAW_OUTPUT else f"{text[:RAW_OUTPUT]}\n… {len(text) - RAW_OUTPUT} more characters"
