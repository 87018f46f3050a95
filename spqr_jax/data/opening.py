"""Opening data: from the text in a config to a source, and from a source to training data."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from spqr_jax.data import coco, drawing, folders, medical, parquet, pictures, tables, webdataset
from spqr_jax.data.dataset import Dataset
from spqr_jax.data.order import ORDERS
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source, mix

# Word before the colon -> reader (path, **options); its keyword arguments are the options after the question mark.
KINDS: dict[str, Callable[..., Source]] = {
    "coco": coco.open_coco,
    "multilingual": coco.open_aligned,
    "parquet": parquet.open_parquet,
    "folder": folders.open_folder,
    "classes": folders.open_classes,
    "artistic": folders.open_artistic,
    "chestxray": medical.open_chest_xray,
    "brainmri": medical.open_brain_mri,
    "webdataset": webdataset.open_webdataset,
}


def open_source(text: str) -> Source:
    """The Source that a text names: `[kind:]path[?option=value&...]`, or several of these joined by " + ".

    Without a kind the layout is found from the files. Samples of a mixture are drawn from its parts in turn. Raises
    FileNotFoundError for a missing path, ValueError naming the unknown kind or option, or the wrong file or field.
    """
    return mix([_open_one(part) for part in parts(text)])


def parts(text: str) -> list[str]:
    """The texts of the data sets that a text joins by " + "."""
    return [part.strip() for part in text.split(" + ")]


def places(text: str) -> tuple[Path, Path | None]:
    """The path that the text of one data set names, and the folder of its images if that is known to lie elsewhere.

    Nothing is opened. Raises ValueError for an unknown kind.
    """
    kind, place, options = _read_text(text)
    path = Path(place).expanduser()
    if folder := options.get("images"):
        return path, Path(folder)
    return path, coco.picture_folders(path)[0] if kind == "coco" and path.suffix == ".json" else None


def _read_text(text: str) -> tuple[str, str, dict[str, str]]:
    """Kind ("" if none is named), place and options of one data set. Raises ValueError for an unknown kind."""
    named = re.match(r"([a-z]{2,}):", text)  # two letters or more: a drive letter is no kind
    kind = named[1] if named else ""
    if named and kind not in KINDS:
        raise ValueError(f"data {text!r}: {kind}: is unknown; expected one of {', '.join(KINDS)}, or a path alone.")
    place, _, query = text[named.end() if named else 0 :].partition("?")
    return kind, place, dict(parse_qsl(query, keep_blank_values=True))


def _open_one(text: str) -> Source:
    kind, place, options = _read_text(text)
    path = Path(place).expanduser()
    pattern = any(c in place for c in "*[")
    if not place or not (pattern or path.exists()):
        raise FileNotFoundError(f"data {text!r}: {path} does not exist; name where your images are.")
    kind = kind or recognise(path)
    known = list(inspect.signature(KINDS[kind]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"data {text!r}: option {option!r} is unknown; {kind} knows {', '.join(known) or 'none'}.")
    return KINDS[kind](path, **options)


def recognise(path: Path) -> str:
    """The kind of a file or folder, found from its names and contents. Raises ValueError if no kind fits."""
    if path.suffix.lower() == ".parquet" and parquet.files(path):
        return "parquet" if parquet.has_pictures(parquet.files(path)[0]) else "multilingual"
    if path.suffix.lower() == ".tar":
        return "webdataset"
    if path.suffix.lower() == ".json":
        return "coco"
    if path.suffix.lower() in tables.SUFFIXES:
        return "multilingual"
    if path.is_dir():
        for kind, holds in FOLDERS.items():
            if holds(path):
                return kind
    raise ValueError(f"{path}: no layout recognised; name it with KIND:PATH, one of {', '.join(KINDS)}.")


def _class_names(path: Path) -> set[str]:
    return {p.name.lower().split("_")[0] for p in (*path.glob("*"), *path.glob("*/*")) if p.is_dir()}


# The first whose condition holds is the kind of a folder.
FOLDERS: dict[str, Callable[[Path], bool]] = {
    "chestxray": lambda p: any(p.glob("*Data_Entry*.csv")),
    "coco": lambda p: any((*p.glob("annotations/captions_*.json"), *p.glob("captions_*.json"))),
    "folder": lambda p: any(f.suffix.lower() in tables.SUFFIXES for f in p.rglob("metadata.*")) or _has_texts(p),
    "webdataset": lambda p: any(p.glob("*.tar")),
    "parquet": lambda p: bool(parquet.files(p)),
    "brainmri": lambda p: bool(_class_names(p) & folders.TUMOUR_FOLDERS),
    "classes": folders.holds_classes,
}


def _has_texts(path: Path) -> bool:
    return any(p.with_suffix(s).is_file() for p in path.glob("*.txt") for s in (".jpg", ".jpeg", ".png", ".webp"))


@functools.lru_cache(maxsize=16)  # every cell of a sweep asks again
def load(
    text: str,
    n: int,
    *,
    side: int,
    seed: int = 0,
    crop: str = "center",
    flip: bool = False,
    max_bad: int = 10,
    order: str = "shuffled",
) -> Dataset:
    """`n` samples of the data set that `text` names (see `open_source`), drawn with `seed`.

    Images become squares of `side` pixels; crop: "center" or "random"; flip: mirror half of them. order: "shuffled",
    the random order of the draw, or "file", the same samples in the order of the file. In both the parts of a mixture
    take turns. Every drawn image is decoded once here, so that a bad one is known before training: up to `max_bad` are
    logged and skipped. Raises ValueError or FileNotFoundError with the file or field.
    """
    for field, value, known in (("crop", crop, pictures.CROPS), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"bft.{field}={value!r} is unknown; expected {' or '.join(known)}.")
    source = open_source(text)
    drawn = drawing.draw(source, n, seed=seed, max_bad=max_bad)
    ordered = drawing.in_file_order(source, drawn) if order == "file" else drawn
    return drawing.dataset(source, ordered, Preprocess(side, crop, flip, seed))
