"""Opening data: from the text in a config to a source, and from a source to training data."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from judges import plugins
from spqr_jax.data import coco, drawing, folders, medical, parquet, pictures, tables, webdataset
from spqr_jax.data.dataset import Dataset
from spqr_jax.data.order import ORDERS
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source, mix, read_by

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

    A kind is one of KINDS, the name of a plug-in, or the dotted path of a reader of your own (`Reader`). Without a kind
    the layout is found from the files. Samples of a mixture are drawn from its parts in turn. Raises FileNotFoundError
    for a missing path, ValueError naming the unknown kind or option, or the wrong file or field.
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
    kind = _named_kind(text)
    if kind and kind not in KINDS and kind not in plugins.offered(plugins.DATA) and not plugins.is_dotted(kind):
        raise ValueError(f"data {text!r}: {kind}: is unknown; expected one of {_known_kinds()}, or a path alone.")
    place, _, query = text[len(kind) + 1 if kind else 0 :].partition("?")
    return kind, place, dict(parse_qsl(query, keep_blank_values=True))


def _named_kind(text: str) -> str:
    """The word before the first colon, "" if it names no kind: in a file's own name there may be a colon too."""
    named = re.match(r"([A-Za-z_][\w.-]+):", text)  # two letters or more: a drive letter is no kind
    if not named:
        return ""
    known = named[1] in KINDS or re.fullmatch("[a-z]+", named[1])
    return named[1] if known or not Path(text.partition("?")[0]).expanduser().exists() else ""


def _known_kinds() -> str:
    own = [name for name in plugins.offered(plugins.DATA) if name not in KINDS]
    return ", ".join([*KINDS, *own, "the dotted path of a reader"])


def _open_one(text: str) -> Source:
    kind, place, options = _read_text(text)
    path = Path(place).expanduser()
    pattern = any(c in place for c in "*[")
    if not place or not (pattern or path.exists()):
        raise FileNotFoundError(f"data {text!r}: {path} does not exist; name where your images are.")
    kind = kind or recognise(path)
    reader = find(kind, f"data {text!r}")
    known = list(inspect.signature(reader.open).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"data {text!r}: option {option!r} is unknown; {kind} knows {', '.join(known) or 'none'}.")
    return reader.open(path, **options) if not reader.plugin else _checked(reader, text, path, options)


class Reader(NamedTuple):
    """A reader of a kind of data: a function open(path, *, option="", ...) -> Source. An option's values are texts.

    plugin: of one that is not of this package, its distribution, version, place and hash (`judges.plugins`).
    """

    open: Callable[..., Source]
    plugin: str = ""


def find(kind: str, where: str) -> Reader:
    """The reader of one of KINDS, of the plug-in of this name, or at this dotted path.

    where: the data set in messages. Raises ValueError for any other name, and for a plug-in that cannot be used.
    """
    if kind in KINDS:
        plugins.warn_if_refused(plugins.DATA, kind)
        return Reader(KINDS[kind])
    plugin = plugins.find(plugins.DATA, kind, where)
    if plugin is None and plugins.is_dotted(kind):
        plugin = plugins.imported(kind, where)
    if plugin is None:
        raise ValueError(f"{where}: {kind}: is unknown; expected one of {_known_kinds()}.")
    if not callable(plugin.value):
        raise ValueError(f"{where}: {plugin.place} is no function; expected open(path, *, option='', ...) -> Source.")
    return Reader(plugin.value, plugin.source())


def _checked(reader: Reader, text: str, path: Path, options: dict[str, str]) -> Source:
    """The source that a plug-in reads. Raises ValueError, naming the plug-in, for any error and for anything else."""
    try:
        source = reader.open(path, **options)
    except Exception as error:
        raise ValueError(f"data {text!r}: {reader.plugin} fails ({plugins.in_words(error)}).") from error
    if not isinstance(source, Source) or len(source.where) != len(source.captions):
        raise ValueError(f"data {text!r}: {reader.plugin} returned no Source with a place for every caption.")
    return read_by(reader.plugin, source)


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
