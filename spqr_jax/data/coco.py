"""COCO captions: the JSON of 2014 or 2017 and the pictures it names; also aligned captions in other languages."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spqr_jax.data import tables
from spqr_jax.data.source import Source, first_column, inside, of_files, pictures_under

# Where several releases lie side by side: the larger and newer first.
RELEASES = ("train2017", "train2014", "val2017", "val2014")
ID_COLUMNS = ("id", "image_id", "cocoid", "coco_id", "filename", "file_name", "image")
LANGUAGE_COLUMNS = ("language", "lang", "image_locale", "locale")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "translation", "sentence")


def open_coco(path: Path, *, images: str = "") -> Source:
    """One caption a picture of a COCO captions file, in the order of picture ids.

    path: `annotations/captions_{train,val}{2014,2017}.json`, or the folder that holds `annotations/`. images: folder of
    the pictures; default the release's own name, or `images/` and the like, beside `annotations/`. Of a picture's
    captions (about five) the one with the lowest annotation id is taken. Raises ValueError naming file and field.
    """
    file = path if path.is_file() else _captions_file(path)
    data = tables.read_json(file)
    for field in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(field), list):
            raise ValueError(f"{file} has no list {field!r}; expected a COCO captions file (captions_*.json).")
    folder = Path(images) if images else _picture_folder(file)
    captions = first_captions(data["annotations"], str(file))
    try:
        named = sorted((int(image["id"]), str(image["file_name"])) for image in data["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: an entry of images lacks a whole-number id or a file_name ({error!r}).") from None
    pairs = ((inside(folder, name, str(file)), captions[i]) for i, name in named if i in captions)
    return of_files(f"coco:{file}", pairs, "caption with the lowest annotation id of each picture")


def first_captions(annotations: Sequence[dict[str, Any]], file: str) -> dict[int, str]:
    """Picture id -> its caption with the lowest annotation id. Raises ValueError naming the field that is missing."""
    best: dict[int, tuple[int, str]] = {}
    for row in annotations:
        try:
            picture, found = int(row["image_id"]), (int(row["id"]), tables.text_of(row["caption"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: an annotation lacks id, image_id or caption ({error!r}).") from None
        if picture not in best or found[0] < best[picture][0]:
            best[picture] = found
    return {picture: caption for picture, (_, caption) in best.items()}


def _captions_file(folder: Path) -> Path:
    for release in RELEASES:
        for place in (folder / "annotations", folder):
            if (place / f"captions_{release}.json").is_file():
                return place / f"captions_{release}.json"
    raise FileNotFoundError(
        f"{folder} holds no annotations/captions_{{train,val}}{{2014,2017}}.json; unpack COCO's annotations there."
    )


def _picture_folder(file: Path) -> Path:
    release = file.stem.removeprefix("captions_")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    for folder in (root / release, root / "images" / release, root / "images"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{root} holds no folder {release} of pictures for {file}; unpack it, or add ?images=DIR.")


def open_aligned(path: Path, *, language: str = "", images: str = "", id: str = "", caption: str = "") -> Source:
    """Captions in one language over COCO pictures, from an aligned table, in the order of the table.

    path: CSV, TSV, JSON lines or Parquet: long (id, language, caption) or wide (id and one column a language).
    language: which, as the table writes it; needed for wide tables and where the table has several. images: the folder
    with the pictures, found by file name or by the number that ends it. A picture's first caption counts.
    """
    rows = tables.read_rows(path)
    columns, name = list(rows[0]), f"multilingual:{path}?language={language}"
    number = first_column(id, ID_COLUMNS, columns, str(path), "id")
    texts, rows = _in_language(rows, columns, language, caption, path)
    if not images or not Path(images).is_dir():
        raise FileNotFoundError(f"{path}: the folder of pictures {images!r} does not exist; set ?images=DIR.")
    index = picture_index(Path(images))
    pairs: dict[Path, str] = {}
    for row in rows:
        key = picture_key(str(row[number]))
        pairs.setdefault(index.get(key, Path(images) / str(key)), tables.text_of(row[texts]))
    return of_files(name, pairs.items(), "first caption of each picture in the table")


def _in_language(rows, columns, language: str, caption: str, path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(caption column, rows in the language)."""
    if not caption and language.lower() in {column.lower() for column in columns if column}:
        return first_column(language, (), columns, str(path), "caption"), rows
    texts = first_column(caption, CAPTION_COLUMNS, columns, str(path), "caption")
    spoken = next((c for c in columns if c and c.lower() in LANGUAGE_COLUMNS), None)
    if spoken is None:
        return texts, rows
    there = sorted({str(row[spoken]) for row in rows})
    kept = [row for row in rows if str(row[spoken]).lower() == language.lower()] if language else rows
    if not kept or (not language and len(there) > 1):
        raise ValueError(f"{path}: ?language={language} is not one of its languages ({', '.join(there)}).")
    return texts, kept


def picture_index(folder: Path) -> dict[int | str, Path]:
    """`picture_key` of every picture under a folder -> its path; of two releases' copies the first."""
    index: dict[int | str, Path] = {}
    for path in pictures_under(folder):
        index.setdefault(picture_key(path.name), path)
    return index


def picture_key(name: str) -> int | str:
    """The number that ends a COCO file name (COCO_val2014_000000000042.jpg, 42.0 and 42 alike), else the name."""
    if re.fullmatch(r"\d+\.0", name):
        return int(float(name))
    stem = Path(name).stem if not name.isdigit() else name
    digits = re.search(r"\d+$", stem)
    return int(digits[0]) if digits else Path(name).name
