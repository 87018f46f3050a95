"""COCO: the captions of 2014 or 2017 and the images that they belong to, and aligned captions in other languages."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spqr_jax.data import tables
from spqr_jax.data.source import Source, first_column, inside, of_files, pictures_under

# The release that is read where several lie side by side: the first of these.
RELEASES = ("train2017", "train2014", "val2017", "val2014")
ID_COLUMNS = ("id", "image_id", "cocoid", "coco_id", "filename", "file_name", "image")
LANGUAGE_COLUMNS = ("language", "lang", "image_locale", "locale")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "translation", "sentence")


def open_coco(path: Path, *, images: str = "") -> Source:
    """A COCO captions file and its images, in the order of image ids.

    Of an image's captions (about five) the one with the lowest annotation id is taken. path: the file
    `annotations/captions_{train,val}{2014,2017}.json`, or the folder that holds `annotations/`. images: folder of the
    images; default the first of RELEASE, images/RELEASE and images that lies beside `annotations/`. Raises
    FileNotFoundError for a missing file or folder, ValueError with file and field for a damaged one.
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
    return of_files(f"coco:{file}", pairs, "caption with the lowest annotation id of each image")


def first_captions(annotations: Sequence[dict[str, Any]], file: str) -> dict[int, str]:
    """Image id -> its caption with the lowest annotation id. Raises ValueError with the fields that may be missing."""
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
    folders = picture_folders(file)
    for folder in folders:
        if folder.is_dir():
            return folder
    release = folders[0]
    raise FileNotFoundError(
        f"{release.parent} holds no folder {release.name} of images for {file}; unpack it, or add ?images=DIR."
    )


def picture_folders(file: Path) -> tuple[Path, Path, Path]:
    """Where the images of a captions file may lie, the usual place first."""
    release = file.stem.removeprefix("captions_")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    return root / release, root / "images" / release, root / "images"


def open_aligned(path: Path, *, language: str = "", images: str = "", id: str = "", caption: str = "") -> Source:
    """Captions in one language over COCO images, from an aligned table, in the order of the table.

    path: CSV, TSV, JSON lines or Parquet. A long table has the columns id, language and caption; a wide one has id and
    one column a language. language: as the table writes it; needed for a wide table, and for one with several
    languages. images: the folder of the images. They are found by file name, or by the number at the end of the name.
    id, caption: names of these columns, default the first that is known. An image's first caption counts. Raises
    FileNotFoundError for a missing folder, ValueError for a table without such a column or language.
    """
    rows = tables.read_rows(path)
    columns, name = list(rows[0]), f"multilingual:{path}?language={language}"
    number = first_column(id, ID_COLUMNS, columns, str(path), "id")
    texts, rows = _in_language(rows, columns, language, caption, path)
    if not images or not Path(images).is_dir():
        raise FileNotFoundError(f"{path}: the folder of images {images!r} does not exist; set ?images=DIR.")
    index = picture_index(Path(images))
    pairs: dict[Path, str] = {}
    for row in rows:
        key = picture_key(str(row[number]))
        pairs.setdefault(index.get(key, Path(images) / str(key)), tables.text_of(row[texts]))
    return of_files(name, pairs.items(), "first caption of each image in the table")


def _in_language(rows, columns, language: str, caption: str, path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(column of captions, rows in the language)."""
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
    """`picture_key` of every image under a folder -> its path. Of two images with the same key the first counts."""
    index: dict[int | str, Path] = {}
    for path in pictures_under(folder):
        index.setdefault(picture_key(path.name), path)
    return index


def picture_key(name: str) -> int | str:
    """The number at the end of a COCO file name, or the name without one.

    COCO_val2014_000000000042.jpg, 42.0 and 42 have the same key.
    """
    if re.fullmatch(r"\d+\.0", name):
        return int(float(name))
    stem = Path(name).stem if not name.isdigit() else name
    digits = re.search(r"\d+$", stem)
    return int(digits[0]) if digits else Path(name).name
