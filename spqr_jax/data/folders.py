"""Folders of images: with a table or text files beside them, or one folder a class."""

from pathlib import Path

from spqr_jax.data import parquet, tables
from spqr_jax.data.source import PICTURE_SUFFIXES, Source, first_column, inside, of_files, pictures_under
from spqr_jax.data.templates import filler, label_of

FILE_COLUMNS = ("file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "additional_feature", "description")
STYLE_TEMPLATE = "a picture in the style of {label}"
TUMOUR_FOLDERS = {"glioma", "meningioma", "notumor", "pituitary", "yes", "no"}


def open_folder(path: Path, *, caption: str = "", file: str = "") -> Source:
    """A folder in the imagefolder convention: images with metadata.jsonl, .csv or .parquet in it or in its subfolders.

    Without such a table, the captions are text files beside the images, with the same names. caption, file: columns of
    captions and of file names, default the first that is known. Raises ValueError if there are no captions.
    """
    metadata = sorted(p for p in path.rglob("metadata.*") if p.suffix.lower() in tables.SUFFIXES)
    if metadata:
        pairs = [pair for table in metadata for pair in _listed(table, caption, file)]
        return of_files(f"folder:{path}", pairs, "caption column of the metadata")
    captioned = [picture for picture in pictures_under(path) if picture.with_suffix(".txt").is_file()]
    if not captioned:
        raise ValueError(
            f"{path} holds no metadata.jsonl, metadata.csv or metadata.parquet and no IMAGE.txt beside images; add "
            "one, or use classes:PATH for one folder a class."
        )
    pairs = [(picture, tables.read_text(picture.with_suffix(".txt")).strip()) for picture in captioned]
    return of_files(f"folder:{path}", pairs, "text file beside each image")


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
    """One folder a class, at any depth. Captions come from `template`.

    Its {label} is the name of an image's folder, with spaces for underscores. Raises ValueError without such a folder.
    """
    caption = filler(template, "classes", ("label",))
    pairs = [(p, caption(label=label_of(p.parent.name))) for p in pictures_under(path) if p.parent != path]
    if not pairs:
        raise ValueError(f"{path} holds no folders of images; expected one folder a class.")
    return of_files(f"classes:{path}", pairs, f"template {template!r}")


def open_artistic(path: Path, *, template: str = STYLE_TEMPLATE, label: str = "") -> Source:
    """Artistic styles: class folders (paper, Figure C: American_Cartoon, Chinese_Ink, ...), or Parquet with a label."""
    if parquet.files(path):
        return parquet.open_parquet(path, template=template, label=label)
    return open_classes(path, template=template)


def holds_classes(path: Path) -> bool:
    """Whether a folder holds folders of images, at any depth, and no image itself."""
    own = any(p.suffix.lower() in PICTURE_SUFFIXES for p in path.iterdir())
    return not own and bool(pictures_under(path))
