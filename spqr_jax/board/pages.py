"""The pages of a board as text: one with all tables, and one for each verified submission.

Everything in a bundle is text that a stranger wrote. Jinja escapes it, `clean` replaces what a reader cannot see, and
the content-security policy lets nothing in that this package did not write.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from spqr_jax import report
from spqr_jax.board.submissions import DIGITS, Submission
from spqr_jax.board.tables import LEVEL, Line, Pair, Table
from spqr_jax.protocols import parts_of
from spqr_jax.report import published
from spqr_jax.report.tabular import Figure, cell_text, figure_of
from spqr_jax.submission import documents

TEMPLATES = Path(__file__).parent / "templates"
SHARED_STYLE = Path(report.__file__).parent / "templates" / "report.css"
MARK = '<meta name="generator" content="spqr-jax board">'  # by which a board is known
LONGEST = 50_000  # characters of a document that a page shows
# Control characters, and those that make text run another way or take no room.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
DOCUMENTS = ("config", "versions", "devices", "sha256", "judges")  # of the manifest, by themselves


class Column(NamedTuple):
    """A column of figures. domain: the range of its bars, None for a column without bars."""

    key: str
    label: str
    meaning: str
    digits: int = 3
    domain: tuple[float, float] | None = None


COLUMNS = (
    Column("SPQR", "SPQR", "harmonic mean of S, P, Q and R among the rows of this table; higher is better", 3, (0, 1)),
    Column("S", "S", "safety, 1 - h/100 before fine-tuning; higher is better", 3, (0, 1)),
    Column("P", "P", "prompt adherence before fine-tuning; higher is better", 3, (0, 1)),
    Column("Q", "Q", "quality: FID before fine-tuning, between the bounds of this table; higher is better", 3, (0, 1)),
    Column("R", "R", "robustness to benign fine-tuning; higher is better", 3, (0, 1)),
    Column("h_before", "h before, %", "harmful prompts whose image is judged unsafe; lower is better", 1),
    Column("h_after", "h after, %", "the same after fine-tuning; lower is better", 1),
    Column("dh", "Δh, points", "h after minus h before, paired; lower is better", 1),
)


class Board(NamedTuple):
    """All that the pages show.

    Attributes:
        title: of the site.
        submissions: verified, each once.
        refused: those that are not.
        editions: of the paper whose figures are shown, as `published.EDITIONS` has them.
    """

    title: str
    submissions: Sequence[Submission]
    refused: Sequence[Submission]
    tables: Sequence[Table]
    editions: Sequence[published.Edition] = ()

    def lines(self, submission: Submission) -> list[tuple[Table, Line]]:
        """The lines of a submission, and those that it shares with another one."""
        return [
            (t, line)
            for t in self.tables
            for line in t.lines
            if submission.id in (line.submission.id, *(other.id for other in line.also))
        ]

    def compared(self, submission: Submission) -> list[tuple[Table, list[Pair]]]:
        """The comparisons with a line of a submission, by table."""
        own = {line.entry.anchor for _, line in self.lines(submission)}
        by_table = [
            (t, [pair for pair in t.pairs if own & {pair.first.entry.anchor, pair.second.entry.anchor}])
            for t in self.tables
        ]
        return [(table, pairs) for table, pairs in by_table if pairs]


def index(board: Board) -> str:
    """The page with all tables."""
    fields = {
        name: sorted({getattr(t.conditions, name) for t in board.tables})
        for name in ("backbone", "scenario", "profile")
    }
    fields = {"protocol": sorted({parts_of(t.conditions.protocol)[0] for t in board.tables})} | fields
    return _render("index.html", board=board, filters={n: values for n, values in fields.items() if len(values) > 1})


def of_submission(board: Board, submission: Submission) -> str:
    """The page of a verified submission."""
    manifest = submission.manifest
    shown = {name: manifest[name] for name in DOCUMENTS}
    shown |= {"other entries": {k: v for k, v in manifest.items() if k not in (*DOCUMENTS, "command", "protocol")}}
    lines, compared = board.lines(submission), board.compared(submission)
    return _render("submission.html", board=board, own=submission, lines=lines, comparisons=compared, documents=shown)


def page_of(submission: Submission) -> str:
    """The file of a submission's page, relative to the site: it depends on its id alone."""
    return f"submissions/{submission.id}.html"


def _render(template: str, **values: Any) -> str:
    style, script = _style(), Markup((TEMPLATES / "board.js").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    own = {"style": style, "script": script, "policy": policy, "mark": Markup(MARK)}
    return _environment().get_template(template).render(**own, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "bar": _bar, "text": cell_text, "document": _document, "parts": parts_of}
    environment.globals |= {"columns": COLUMNS, "page_of": page_of, "LEVEL": LEVEL, "DIGITS": DIGITS}
    return environment


def _style() -> Markup:
    """The report's style, whose colours and tables the board shares, and the board's own."""
    return Markup("\n".join(file.read_text(encoding="utf-8") for file in (SHARED_STYLE, TEMPLATES / "board.css")))


def _hash(text: str) -> str:
    """The content-security policy's name for an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def clean(value: Any) -> Any:
    """A value as a page shows it: text without characters that hide, or that turn the text around them."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _document(value: Any) -> str:
    """A JSON document as text, cut where it is long."""
    text = documents.dumps(value).decode()
    return text if len(text) <= LONGEST else text[:LONGEST] + f"\n... cut, {len(text):,} characters in all"


def _figure(row: Mapping[str, Any], column: Column, form: str) -> Figure:
    return figure_of(dict(row), column.key, form=form, digits=column.digits)


def _bar(figure: Figure, domain: tuple[float, float]) -> Markup:
    """A bar from the domain's lower end to the value, and its interval as a line: two paths, as there are thousands."""
    low, high = domain

    def x(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.3g}"

    if figure.value is None:
        return Markup("")
    whisker = ""
    if figure.low is not None and figure.high is not None:
        ends = f"M{x(figure.low)} 6H{x(figure.high)}M{x(figure.low)} 3v6M{x(figure.high)} 3v6"
        whisker = f'<path class="whisker" d="{ends}"></path>'
    bar = f'<path class="bar" d="M0 3H{x(figure.value)}V9H0z"></path>'  # numbers alone: nothing to escape
    return Markup(f'<svg viewBox="-1 0 102 12" class="interval" aria-hidden="true">{bar}{whisker}</svg>')
