"""Write SITE: index.html, and submissions/<id>.html for each verified submission."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spqr_jax.board import pages, store, tables
from spqr_jax.board.pages import Board
from spqr_jax.board.submissions import Submission
from spqr_jax.files import storage
from spqr_jax.report import published
from spqr_jax.submission import division, places

INDEX = "index.html"
PAGES = "submissions"
TITLE = "SPQR board"


def write(
    bundles: Sequence[str | Path],
    out: str | Path,
    *,
    cache: str | Path | None = None,
    pins: division.Pins | None = None,
    papers: bool = False,
    title: str = TITLE,
    progress: Callable[[str], None] = lambda text: None,
) -> Board:
    """Write the site of many submissions, and return what it shows.

    Args:
      bundles: directories that `submit` wrote, and directories of such directories.
      out: directory to write: a new or empty one, or that of an earlier board, whose pages are replaced.
      cache: directory for what was found out about bundles; None verifies each of them again.
      pins: what the closed division requires, default that of this package.
      papers: also show the figures that the papers print, apart and marked.
      progress: is told which bundle is verified.

    The same bundles give the same bytes. Raises ValueError for an `out` that holds other things, or where `bundles` are
    none, and FileNotFoundError for one that does not exist.
    """
    site, found = Path(out), [bundle for path in bundles for bundle in _bundles(Path(path))]
    if not found:
        raise ValueError(f"{', '.join(map(str, bundles))}: no bundle is there; name what submit wrote.")
    _check(site)
    read = []
    for number, directory in enumerate(found, 1):
        progress(f"{number} of {len(found)}: {directory.name}")
        read.append(store.submission(directory, None if cache is None else Path(cache), pins))
    verified = {s.id: s for s in reversed(read) if s.verification.verified}  # each once
    submissions = sorted(verified.values(), key=lambda s: s.id)
    refused = sorted((s for s in read if not s.verification.verified), key=lambda s: (s.name, s.id))
    editions = tuple(published.EDITIONS.values()) if papers else ()
    board = Board(title, submissions, refused, tables.build(submissions), editions)
    _write(board, site)
    return board


def _bundles(path: Path) -> list[Path]:
    """The bundle in a directory, or those in its folders. A folder that is no bundle is one that fails."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no directory; name a bundle that submit wrote, or a folder of bundles.")
    if any((path / name).exists() for name in places.REQUIRED):
        return [path]
    return sorted(p for p in path.iterdir() if not p.name.startswith(".") and (p.is_dir() or p.is_symlink()))


def _check(site: Path) -> None:
    """Raise ValueError for a directory in which a board would replace other things."""
    if site.exists() and not site.is_dir():
        raise ValueError(f"out: {site} is a file; choose a directory.")
    others = site.is_dir() and {path.name for path in site.iterdir()} - {INDEX, PAGES}
    if others or (site.is_dir() and any(site.iterdir()) and not _is_board(site)):
        raise ValueError(f"out: {site} holds other things than a board; choose a new or empty directory.")


def _is_board(site: Path) -> bool:
    page = site / INDEX
    return page.exists() and pages.MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]


def _write(board: Board, site: Path) -> None:
    """The pages of submissions first: no link of the index leads nowhere. Pages of removed ones go last."""
    kept = set()
    for submission in board.submissions:
        path = site / pages.page_of(submission)
        storage.write_text(path, pages.of_submission(board, submission))
        kept.add(path.name)
    storage.write_text(site / INDEX, pages.index(board))
    if (site / PAGES).is_dir():
        for path in (site / PAGES).iterdir():
            if path.name not in kept:
                path.unlink()


def summary(board: Board, site: Path) -> str:
    """What was written, and what is wrong with the bundles that are not on it."""

    def told(s: Submission) -> list[str]:
        return [f"{places.shown(s.name)}: {line}" for line in s.verification.faults[:3]]

    rows = sum(len(t.lines) for t in board.tables)
    head = f"{site / INDEX}: {len(board.submissions)} submissions, {rows} rows in {len(board.tables)} tables"
    refused = [f"{len(board.refused)} not verified:"] if board.refused else []
    return "\n".join([head, *refused, *(line for s in board.refused for line in told(s))])
