"""Folders of pictures: with a metadata table or text files beside them, or one folder a class."""

from pathlib import Path

from spqr_jax.data import parquet, tables
from spqr_jax.data.source import PICTURE_SUFFIXES, Source, first_column, inside, of_files, pictures_under
from spqr_jax.data.templates import filler, label_of

FILE_COLUMNS = ("file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "additional_feature", "description")
STYLE_TEMPLATE = "a picture in the style of {label}"
TUMOUR_FOLDERS = {"glioma", "meningioma", "notumor", "pituitary", "yes", "no"}


def open_folder(path: Path, *, caption: str = "", file: str = "") -> Source:
    """A folder in the imagefolder convention: metadata.jsonl, .csv or .parquet (file_name and a caption column) in it
    or in its subfolders; without one, a text file of the same name beside every picture."""
    metadata = sorted(p for p in path.rglob("metadata.*") if p.suffix.lower() in tables.SUFFIXES)
    if metadata:
        pairs = [pair for table in metadata for pair in _listed(table, caption, file)]
        return of_files(f"folder:{path}", pairs, "caption column of the metadata")
    captioned = [picture for picture in pictures_under(path) if picture.with_suffix(".txt").is_file()]
    if not captioned:
        raise ValueError(
            f"{path} holds no metadata.jsonl, metadata.csv or metadata.parquet and no PICTURE.txt beside pictures; add "
            "one, or use classes:PATH for one folder a class."
        )
    pairs = [(picture, tables.read_text(picture.with_suffix(".txt")).strip()) for picture in captioned]
    return of_files(f"folder:{path}", pairs, "text file beside each picture")


def _listed(table: Path, caption: str, file: str) -> list[tuple[Path, str]]:
    rows = tables.read_rows(table)
    columns = list(rows[0])
    name = first_column(file, FILE_COLUMNS, columns, str(table), "file")
    text = first_column(caption, CAPTION_COLUMNS, columns, str(table), "caption")
    return [
        (inside(table.parent, str(row.get(name) or ""), f"{table}, row {i}"), tables.text_of(row.get(text)))
        for i, row in enumerate(rows)
    ]


def open_classes(path: Path, *, template: str = STYLE_TEMPLATE) -> Source:
    """One folder a class, at any depth; captions from `template`, whose {label} is the name of a picture's folder with
    spaces for underscores."""
    caption = filler(template, "classes", ("label",))
    pairs = [(p, caption(label=label_of(p.parent.name))) for p in pictures_under(path) if p.parent != path]
    if not pairs:
        raise ValueError(f"{path} holds no folders of pictures; expected one folder a class.")
    return of_files(f"classes:{path}", pairs, f"template {template!r}")


def open_artistic(path: Path, *, template: str = STYLE_TEMPLATE, label: str = "") -> Source:
    """Styles: class folders (paper, Figure C: American_Cartoon, Chinese_Ink, ...), or Parquet with a style label."""
    if parquet.files(path):
        return parquet.open_parquet(path, template=template, label=label)
    return open_classes(path, template=template)


def holds_classes(path: Path) -> bool:
    """Whether a folder holds folders of pictures, to any depth, and none of its own."""
    own = any(p.suffix.lower() in PICTURE_SUFFIXES for p in path.iterdir())
    return not own and bool(pictures_under(path))
