"""Prompt sets: the prompt files that published work uses, read unchanged."""

import csv
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.data import coco

MAX_SEED = 2**32
PROMPT_COLUMNS = ("prompt", "sensitive prompt", "text", "caption", "nsfw")
ID_COLUMNS = ("case_number", "image_id", "coco_id", "id")
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale", "guidance")
CATEGORY_COLUMNS = ("categories", "category", "tag", "type")
LANGUAGE_COLUMNS = ("language", "lang")


class Prompt(NamedTuple):
    """One row of a prompt set. `guidance` is None where the file names none; `seed` in 0..2**32-1."""

    id: str
    prompt: str
    category: str = ""
    language: str = "en"
    seed: int = 0
    guidance: float | None = None


def load(source: str, n: int, *, seed: int = 0) -> list[Prompt]:
    """`n` prompts of a file, drawn with `seed` (the paper draws 500 of ViSU's with seed 42) and kept in file order.

    source: a .csv, .tsv, .json, .jsonl or .txt file. Raises FileNotFoundError, or ValueError naming the file and what
    is wrong: no prompt column, too few rows, a bad seed.
    """
    rows = read_file(Path(source))
    if len(rows) < n:
        raise ValueError(f"{source} holds {len(rows)} prompts, the config asks for {n}; lower prompts.n_*.")
    chosen = sorted(random.Random(seed).sample(range(len(rows)), n))
    return [rows[i] for i in chosen]


def read_file(path: Path) -> list[Prompt]:
    """Every prompt of a file; layouts of I2P, UnlearnDiffAtk, ESD, MACE, UCE, RECE, Ring-A-Bell, ViSU and COCO-30k, and
    COCO's own captions files (the caption with the lowest annotation id of each image).

    Only a prompt column is required. An empty prompt stays an empty prompt (I2P has one), extra columns are ignored.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"prompt file {path} does not exist; set prompts.harmful or prompts.benign.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    rows = list(_rows(path, text))
    if not rows:
        raise ValueError(f"prompt file {path} holds no rows.")
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise ValueError(
            f"prompt file {path} has columns {sorted(rows[0])}, expected one of {', '.join(PROMPT_COLUMNS)}."
        )
    prompts = [_prompt(row, column, i, path) for i, row in enumerate(rows)]
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):  # some files number each source anew: then the row decides
        prompts = [prompt._replace(id=str(i)) for i, prompt in enumerate(prompts)]
    return prompts


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
