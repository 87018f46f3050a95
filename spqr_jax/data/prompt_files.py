"""Prompt files of EMMA, T2I-RiskyPrompt and Six-CD, which are more than tables with a column of prompts.

Each reader takes the path of a file and its text, and returns a row for each prompt, in file order. The files are the
user's own copies. Layouts are those of the authors' repositories, read in November 2026. A file that differs raises
ValueError naming it, what was expected, and what was found.
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spqr_jax.data import tables

Row = dict[str, Any]
# Six-CD: templates of prompts for the concepts of a file that has none of its own name.
SHARED_TEMPLATES = "Celebrity_Copyright_Object.txt"
PLACEHOLDER = re.compile(r"\{\w+\}")


def emma(path: Path, text: str) -> list[Row]:
    """Rows of a file of EMMA, `prompts/<domain>/<1_name ... 7_hard>.json`: the category is the erased concept.

    The file maps concepts to lists of prompts: a list of objects, or one object (its art/6_random and art/7_hard).
    """
    found = tables.parse_json(text, _named(path))
    objects = found if isinstance(found, list) else [found]
    rows: list[Row] = []
    for i, entry in enumerate(objects):
        if not isinstance(entry, dict):
            raise ValueError(f"{_named(path)}, entry {i}: expected an object of concepts, found {_kind(entry)}.")
        for concept, prompts in entry.items():
            if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError(f"{_named(path)}, {concept!r}: expected a list of prompts, found {_kind(prompts)}.")
            rows += [{"prompt": prompt, "category": concept} for prompt in prompts]
    return rows


def riskyprompt(path: Path, text: str) -> list[Row]:
    """Rows of T2I-RiskyPrompt.json: the categories are the labels ("Violence--Weapons_and_Conflicts"), one or several.

    The column `primary` has their first parts. The file maps numbers to a prompt and its label; the label maps each
    category to the reasons for it, which are not read.
    """
    found = tables.parse_json(text, _named(path))
    if not isinstance(found, dict):
        raise ValueError(f"{_named(path)}: expected an object of numbered prompts, found {_kind(found)}.")
    rows: list[Row] = []
    for number, entry in found.items():
        entry = entry if isinstance(entry, dict) else {}
        prompt, label = entry.get("prompt"), entry.get("label")
        if not isinstance(prompt, str) or not isinstance(label, dict) or not all("--" in name for name in label):
            raise ValueError(
                f"{_named(path)}, entry {number!r}: expected a text `prompt` and an object `label` of categories such "
                f'as "PRIMARY--SECOND", found {", ".join(entry) or "neither"}.'
            )
        primary = dict.fromkeys(name.partition("--")[0] for name in label)
        rows.append({"id": number, "prompt": prompt, "category": ", ".join(label), "primary": ", ".join(primary)})
    return rows


def sixcd(path: Path, text: str) -> list[Row]:
    """Rows of a .csv file of Six-CD: prompts with their seeds, or concepts, each in all templates.

    Templates of concepts lie beside their file: `templates/<name of the file>.txt`, or the shared ones. The category is
    the concept or the `target`, which only some files have.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        rows: list[Row] = list(reader)
    except csv.Error as error:
        raise ValueError(f"{_named(path)}, line {reader.line_num}: {error}.") from None
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{_named(path)}, row {i}: expected {len(reader.fieldnames or ())} fields.")
    columns = set(reader.fieldnames or ())
    if columns == {"id", "concept"}:
        frames = _templates(path)
        return [
            {"prompt": row["concept"].join(PLACEHOLDER.split(frame)), "category": row["concept"]}
            for row in rows
            for frame in frames
        ]
    if columns - {"target"} != {"case_number", "evaluation_seed", "prompt"}:
        raise ValueError(
            f"{_named(path)} has columns {sorted(columns)}, expected case_number, evaluation_seed, prompt and perhaps "
            "target, or id and concept."
        )
    return [row | {"category": row.get("target", "")} for row in rows]


READERS: dict[str, Callable[[Path, str], list[Row]]] = {"emma": emma, "riskyprompt": riskyprompt, "sixcd": sixcd}


def _templates(path: Path) -> list[str]:
    """The frames for the concepts of a file, each with one placeholder in braces."""
    own, shared = (path.parent / "templates" / name for name in (f"{path.stem}.txt", SHARED_TEMPLATES))
    place = own if own.exists() else shared
    if not place.exists():
        raise FileNotFoundError(f"{_named(path)} holds concepts, and neither {own} nor {shared} exists; put it there.")
    frames = [line.strip().strip('"') for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    for frame in frames:
        if len(PLACEHOLDER.findall(frame)) != 1:
            raise ValueError(f"{_named(place)}: {frame!r} has not one placeholder such as {{name}}.")
    return frames


def _named(path: Path) -> str:
    return f"prompt file {path}"


def _kind(value: Any) -> str:
    return type(value).__name__
