"""The figures printed in the editions of the paper, so that a run can be set beside the edition that it follows.

An edition is data (`edition.Edition`), and this module finds the one that belongs to a run. Published rows stand beside
a run only where its protocol is that edition's, without any change: a figure that looks comparable and is not would be
worse than none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from spqr_jax.protocols import parts_of
from spqr_jax.report.published.arxiv_2511 import ARXIV_2511
from spqr_jax.report.published.eccv_2026 import ECCV_2026
from spqr_jax.report.published.edition import Edition

EDITIONS = {edition.protocol: edition for edition in (ARXIV_2511, ECCV_2026)}


def edition_of(protocol: str | None) -> Edition | None:
    """The edition whose protocol a row names ("eccv-2026"). None for others, and for changed ones: their label is
    longer ("eccv-2026, changed: bft.rank")."""
    return EDITIONS.get(protocol or "")


def edition_of_rows(rows: Sequence[Mapping[str, Any]]) -> Edition | None:
    """The edition that all rows of a leaderboard follow; None where they follow none, or several protocols."""
    protocols = _protocols(rows)
    return edition_of(protocols[0]) if len(protocols) == 1 else None


def why_none(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why no published rows stand beside these rows, as a sentence; "" where an edition's do."""
    if edition_of_rows(rows):
        return ""
    return f"No published rows beside these: {_reason(_protocols(rows))}."


def _reason(protocols: list[str | None]) -> str:
    if len(protocols) > 1:
        return f"they follow different protocols ({'; '.join(map(str, protocols))})"
    if not protocols or not protocols[0]:
        return "they name no protocol"
    name, changed = parts_of(protocols[0])
    if changed and name in EDITIONS:
        return f"their protocol is {protocols[0]}"
    return f"no edition of the paper follows the protocol {name}"


def _protocols(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The distinct protocols of the rows; None stands for rows that name none."""
    return list(dict.fromkeys(row.get("protocol") for row in rows))


def about_ceilings(edition: Edition) -> str:
    """A sentence on the ceilings of an edition's P, which differ between backbones; "" where P is the cosine."""
    if not edition.ceilings:
        return ""
    known = sorted({ceiling for ceiling in edition.ceilings.values() if ceiling is not None})
    parts = [f"{c:.3f} ({', '.join(b for b, other in edition.ceilings.items() if other == c)})" for c in known]
    unknown = " and ".join(b for b, ceiling in edition.ceilings.items() if ceiling is None)
    return (
        f"Its P imply a ceiling of {' and another one of '.join(parts)}; that of {unknown} is not known: compare P and "
        "SPQR only under the same ceiling."
    )
