"""Prompt sets: the prompt files that published work uses, read unchanged, and selections of their rows.

A prompt set is named by its file, and a selection after a question mark: conditions joined by "&", each on a column of
the file. "visu.json?tag=sexual,nudity" takes the rows with either tag, "i2p.csv?nudity_percentage>=10&hard=0" those
that fulfil both. The names `category` and `language` stand for any column with such a meaning. "n=100" is no condition
but the number of prompts to draw.
"""

import csv
import io
import json
import operator
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.data import coco, prompt_files

MAX_SEED = 2**32
PROMPT_COLUMNS = ("prompt", "sensitive prompt", "text", "caption", "nsfw")
ID_COLUMNS = ("case_number", "image_id", "coco_id", "id")
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale", "guidance")
CATEGORY_COLUMNS = ("categories", "category", "tag", "type")
LANGUAGE_COLUMNS = ("language", "lang")
# Published sets: "visu:FILE" says that the file is one. A protocol knows the first three, others have a reader.
KINDS = ("visu", "i2p", "rab", *prompt_files.READERS)
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    **{">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt},
}


class Prompt(NamedTuple):
    """One row of a prompt set. `guidance` is None where the file names none; `seed` in 0..2**32-1."""

    id: str
    prompt: str
    category: str = ""
    language: str = "en"
    seed: int = 0
    guidance: float | None = None


class Condition(NamedTuple):
    """A condition on a column: its value is one of some words, or compares with a number."""

    column: str
    comparison: str  # "=", or one of COMPARISONS
    value: str

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row fulfils it. A value with several words ("sexual, violence") counts as each of them.

        A row without a number does not fulfil a comparison.
        """
        names = {"category": CATEGORY_COLUMNS, "language": LANGUAGE_COLUMNS}.get(self.column, (self.column,))
        found = next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")
        if self.comparison == "=":
            return not set(words(found)).isdisjoint(words(self.value))
        try:
            return COMPARISONS[self.comparison](float(found), float(self.value))
        except ValueError:
            return False


def words(text: str) -> list[str]:
    """The parts of a list with commas: "sexual, violence" has two."""
    return [word.strip() for word in text.split(",")]


def path_of(source: str) -> Path:
    """The file of a prompt set: "FILE" of "visu:FILE?tag=nudity"."""
    return Path(_kind(source)[1].partition("?")[0])


def load(source: str, n: int, *, seed: int = 0) -> list[Prompt]:
    """`n` prompts of a file, drawn with `seed` after the selection.

    source: a .csv, .tsv, .json, .jsonl or .txt file, after "KIND:" if it is of one of KINDS, with a selection after "?"
    if not all rows may be drawn; its number of prompts ("n=100") counts instead of `n`. The draw is that of the
    official scripts, `random.seed(seed)` and `random.sample(rows, n)` over the selected rows in file order. The result
    has the order of the draw after a selection, and file order without one. Raises FileNotFoundError, or ValueError
    naming the file and what is wrong: no prompt column or another layout than that of the kind, an unknown column in
    the selection, too few rows, a bad seed.
    """
    path, (conditions, number) = path_of(source), _selection(source)
    read = _read(path, conditions, _kind(source)[0])
    rows = [prompt for prompt, raw in read if all(condition.holds(raw) for condition in conditions)]
    n = n if number is None else number
    if len(rows) < n:
        raise ValueError(
            f"{source} holds {len(rows)} prompts, the config asks for {n}; lower prompts.n_*, or a probe's n."
        )
    chosen = random.Random(seed).sample(range(len(rows)), n)
    return [rows[i] for i in (chosen if conditions else sorted(chosen))]


def _kind(source: str) -> tuple[str, str]:
    """The kind before the colon, "" without one, and the rest."""
    kind, colon, rest = source.partition(":")
    return (kind, rest) if colon and kind in KINDS else ("", source)


def _selection(source: str) -> tuple[list[Condition], int | None]:
    """The conditions after the question mark, and the number of prompts if it is given there."""
    conditions, number = [], None
    for part in filter(None, _kind(source)[1].partition("?")[2].split("&")):
        found = re.fullmatch(r"([^<>=]+)(>=|<=|=|>|<)(.*)", part)
        if found is None:
            raise ValueError(
                f"prompt set {source}: {part!r} is no condition; write column=value, column>=number or n=100."
            )
        condition = Condition(*found.groups())
        if condition.comparison != "=" and not _is_number(condition.value):
            raise ValueError(f"prompt set {source}: {condition.value!r} in {part!r} is no number.")
        if condition[:2] == ("n", "="):
            if not condition.value.isdecimal() or int(condition.value) < 1:
                raise ValueError(f"prompt set {source}: {part!r}: expected a whole number of at least 1.")
            number = int(condition.value)
        else:
            conditions.append(condition)
    return conditions, number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_file(path: Path) -> list[Prompt]:
    """Every prompt of a file; layouts of I2P, UnlearnDiffAtk, ESD, MACE, UCE, RECE, Ring-A-Bell, ViSU and COCO-30k, and
    COCO's own captions files (the caption with the lowest annotation id of each image).

    Only a prompt column is required. An empty prompt stays an empty prompt (I2P has one), extra columns are ignored.
    """
    return [prompt for prompt, _ in _read(path, ())]


def _read(path: Path, conditions: Iterable[Condition], kind: str = "") -> list[tuple[Prompt, dict[str, Any]]]:
    """Every prompt of a file with its row. Raises ValueError for a condition on a column that the file lacks."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"prompt file {path} does not exist; set prompts.harmful or prompts.benign.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    reader = prompt_files.READERS.get(kind, _rows)
    rows = list(reader(path, text))
    if not rows:
        raise ValueError(f"prompt file {path} holds no rows.")
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise ValueError(
            f"prompt file {path} has columns {sorted(rows[0])}, expected one of {', '.join(PROMPT_COLUMNS)}."
        )
    for condition in conditions:
        _check_column(path, condition, rows)
    prompts = [_prompt(row, column, i, path) for i, row in enumerate(rows)]
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):  # some files number each source anew: then the row decides
        prompts = [prompt._replace(id=str(i)) for i, prompt in enumerate(prompts)]
    return list(zip(prompts, rows, strict=True))


def _check_column(path: Path, condition: Condition, rows: list[dict[str, Any]]) -> None:
    known = {name for row in rows for name in row}
    if condition.column in known or condition.column in ("category", "language"):
        return
    raise ValueError(
        f"prompt file {path} has no column {condition.column!r} to select by; its columns: "
        f"{', '.join(sorted(map(str, known)))}."
    )


def _rows(path: Path, text: str) -> Iterable[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return csv.DictReader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else ",")
    if kind == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if kind == ".json":
        data = json.loads(text)
        if isinstance(data, dict) and "annotations" in data:
            captions = coco.first_captions(data["annotations"], f"prompt file {path}")
            return [{"image_id": number, "caption": captions[number]} for number in sorted(captions)]
        data = data.get("data", data) if isinstance(data, dict) else data
        return list(data.values()) if isinstance(data, dict) else data
    if kind == ".txt":
        return [{"prompt": line} for line in text.splitlines() if line.strip()]
    raise ValueError(f"prompt file {path}: {kind or 'no'} extension, expected .csv, .tsv, .json, .jsonl or .txt.")


def _prompt(row: dict[str, Any], column: str, index: int, path: Path) -> Prompt:
    def first(columns, default):
        return next((row[name] for name in columns if row.get(name) not in (None, "")), default)

    seed = int(float(first(SEED_COLUMNS, index)))
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"prompt file {path}, row {index}: seed {seed} is outside 0..{MAX_SEED - 1}.")
    guidance = first(GUIDANCE_COLUMNS, None)
    number = str(first(ID_COLUMNS, index))
    return Prompt(
        number.removesuffix(".0"),  # pandas writes whole numbers beside gaps as floats
        "" if row.get(column) is None else str(row[column]),
        str(first(CATEGORY_COLUMNS, "")).strip(),
        str(first(LANGUAGE_COLUMNS, "en")),
        seed,
        None if guidance is None else float(guidance),
    )
