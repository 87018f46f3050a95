"""Write WORKDIR/report: index.html (one self-contained file), figures/ and tables/.

All text is escaped, since prompts, file names and the answers of judges are not trusted. The content-security policy
allows only the page's own style and script, by their hashes, and images in the page or beside it. Nothing comes from a
network.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spqr_jax.files import storage
from spqr_jax.files.layout import ReportFolder, Workdir
from spqr_jax.report import figures as figures_lib
from spqr_jax.report import gallery
from spqr_jax.report.page import Page
from spqr_jax.report.page import build as build_page
from spqr_jax.report.reading import ReportedRun, read, shown_profile
from spqr_jax.report.tables import build as build_tables
from spqr_jax.report.tabular import Table, cell_text
from spqr_jax.report.tabular import write as write_tables

TEMPLATES = Path(__file__).parent / "templates"
UNFINISHED = "<!doctype html>\n<title>Unfinished</title>\n<p>Not finished: run the same command again.</p>\n"
LARGEST_PAGE = 5_000_000  # bytes; above it the images of the gallery are written beside the page


def write(
    workdir: str | Path,
    *more: str | Path,
    out: str | Path | None = None,
    tables: Sequence[str | int] | None = None,
    figures: Sequence[str] | None = None,
    prompts: int = 48,
    blur: bool = True,
    largest_page: int = LARGEST_PAGE,
) -> Path:
    """Write the report on finished work directories and return the path of its index.html.

    Args:
      workdir: directory with leaderboard.json, manifest.json and cells/; only leaderboard.json is required.
      more: further work directories to set beside it, with other backbones, LoRA ranks or prompt sets.
      out: directory to write to, by default WORKDIR/report. Required with more than one work directory.
      tables: names of the tables to write, of `tables.TABLES`; None writes all.
      figures: names of the figures to write, of `figures.FIGURES`; None writes all.
      prompts: how many prompts the gallery has at most, each with the images of every subject and cell.
      blur: whether images of harmful prompts are blurred in the figure of examples; the page always blurs them.
      largest_page: bytes of index.html at most. To stay below, images lie in report/thumbs and prompts are left out.

    The same work directory gives the same bytes. Missing pieces are listed at the top of the page.
    Raises FileNotFoundError without a leaderboard.json, and ValueError for a malformed one or an argument at fault.
    """
    if prompts < 0:
        raise ValueError(f"prompts: expected 0 or more, found {prompts}.")
    if more and out is None:
        raise ValueError("out: a report on several work directories belongs to none of them; say where to write it.")
    run = read(workdir, *more)
    named = build_tables(run, tables)
    report = ReportFolder(storage.directory(out)) if out is not None else Workdir(run.directory).report
    _start(report)
    with storage.local_directory(report.path) as folder:
        local = ReportFolder(folder)
        drawn = figures_lib.write(run, local.figures, figures, blur=blur)
        files = [path.relative_to(folder).as_posix() for path in write_tables(named, local.tables) + drawn]
        storage.write_text(local.page, _fit(run, named, files, local, prompts, largest_page))
    return report.page


def _start(report: ReportFolder) -> None:
    """Remove an earlier report and mark this one as unfinished, so that a report that is cut short is known as one.

    Raises ValueError for a directory with other things in it: parts of it would be removed.
    """
    directory = report.path
    if directory.is_file():
        raise ValueError(f"out: {directory} is a file; choose a directory.")
    others = directory.is_dir() and any(not path.name.endswith(".partial") for path in directory.iterdir())
    if others and not report.page.exists():
        raise ValueError(f"out: {directory} is not empty and holds no report; choose a new or empty directory.")
    storage.write_text(report.page, UNFINISHED)
    for made in (report.thumbs, report.figures, report.tables):
        storage.remove(made)


def _fit(
    run: ReportedRun, named: list[Table], files: list[str], report: ReportFolder, prompts: int, largest: int
) -> str:
    """The page as text: with its images inside if it stays small enough, else beside it, else with fewer prompts."""
    shown, pictures = build_page(run, named), gallery.build(run, prompts=prompts)
    if gallery.picture_bytes(pictures) * 4 / 3 <= largest:  # as base64
        html = render(shown, pictures, files, gallery.data_uri)
        if len(html.encode()) <= largest:
            return html
    bare = len(render(shown, gallery.fewer(pictures, 0), files, gallery.data_uri).encode())
    while True:
        shutil.rmtree(report.thumbs, ignore_errors=True)
        html = render(shown, pictures, files, gallery.beside(report))
        size, count = len(html.encode()), len(pictures.groups)
        if size <= largest or not count:
            return html
        fitting = int(0.98 * count * (largest - bare) / max(size - bare, 1))
        pictures = gallery.fewer(pictures, max(0, min(count - 1, fitting)))


def render(shown: Page, pictures: gallery.Gallery, files: list[str], source: Callable[[gallery.Thumbnail], str]) -> str:
    """The page as text. `source` gives the address from which an image element can load a thumbnail."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pretty": pretty, "cell_text": cell_text, "shown_profile": shown_profile}
    environment.tests["scalar"] = lambda value: not isinstance(value, dict | list)
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    script = Markup((TEMPLATES / "report.js").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data: 'self' file:; base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html")
    own = {"style": style, "script": script, "policy": policy}
    return template.render(page=shown, gallery=pictures, files=files, source=source, **own)


def pretty(value: Any) -> str:
    """A manifest entry as text: floats to four digits, anything that is not a scalar as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hash(text: str) -> str:
    """The content-security policy's name for an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
