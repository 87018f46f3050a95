"""What the paper's methods, fine-tuning and sampling take of every target's memory: tables of docs/accelerators.md.

    python -m benchmarks.targets --out fits
    python -m benchmarks.targets --out fits --models SD1.5,SDXL --targets h100,a100-40,tpu-v5e-4
    python -m benchmarks.targets --out fits --table

Runs `python -m spqr_jax.fit` for every model and target, and keeps its answers in the directory: what is there is not
asked again, so a run that was stopped continues. --table prints what is there and asks nothing. Arguments after --
go to spqr_jax.fit, as in `-- --compile_timeout_s 600`. A cell without an answer says why.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spqr_jax.fit import targets

ROOT = Path(__file__).parents[1]
# Model -> the config whose programs are compiled: one sample of the paper's profile "standard", and its sampler.
MODELS = {
    "SD1.5": "configs/general.py",
    "SD2.1": "configs/backbones.py:sd21",
    "SDXL": "configs/backbones.py:sdxl",
    "emoji": "configs/mini.py",
}
HEAD = ("target", "training step, GB on a device", "sampler, GB on a device", "other programs", "device-hours", "fits")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the answers")
    parser.add_argument("--models", default=",".join(MODELS), help="default: all")
    parser.add_argument("--targets", default=",".join(targets.TARGETS), help="default: all")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    given = list(sys.argv[1:] if argv is None else argv)
    mine, further = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = parser.parse_args(mine)
    models, names = options.models.split(","), options.targets.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"--models has {unknown[0]!r}; expected some of {', '.join(MODELS)}")
    if unknown := [name for name in names if name not in targets.TARGETS]:
        parser.error(f"--targets has {unknown[0]!r}; expected some of {', '.join(targets.TARGETS)}")
    if not options.table:
        fill(options.out, models, names, further)
    tables = (make(options.out, model, names) for model in models for make in (table, aligning_table))
    print("\n\n".join(text for text in tables if text))


def fill(out: Path, models: Sequence[str], names: Sequence[str], further: Sequence[str]) -> None:
    """Ask for every cell without an answer. Where there is none, the reason is kept in its place."""
    out.mkdir(parents=True, exist_ok=True)
    cells = [(model, name) for model in models for name in names if not _file(out, model, name).exists()]
    for model, name in (bar := tqdm(cells, unit="cell", disable=None)):
        bar.set_description(f"{model} on {name}")
        file = _file(out, model, name)
        line = [sys.executable, "-m", "spqr_jax.fit", "--config", MODELS[model], "--target", name, "--json", str(file)]
        run = subprocess.run([*line, *further], cwd=ROOT, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            file.with_suffix(".txt").write_text(_last(run.stderr) + "\n", encoding="utf-8")
        else:
            file.with_suffix(".txt").unlink(missing_ok=True)


def _last(text: str) -> str:
    """The line that says what is wrong; "Try --help." is not it."""
    lines = [line for line in text.strip().splitlines() if line != "Try --help."]
    return lines[-1] if lines else "no message"


def _file(out: Path, model: str, name: str) -> Path:
    return out.resolve() / f"{model}_{name}.json"


# --- the tables


def table(out: Path, model: str, names: Sequence[str]) -> str:
    """The Markdown table of a model: a row for each target."""
    rows = [_row(_file(out, model, name), name) for name in names]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join([f"{model}, `{MODELS[model]}`:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _row(file: Path, name: str) -> tuple[str, ...]:
    if not file.exists():
        why = file.with_suffix(".txt")
        return name, why.read_text(encoding="utf-8").strip() if why.exists() else "not asked", "", "", "", "not known"
    answer = json.loads(file.read_text(encoding="utf-8"))
    steps = [row for row in answer["programs"] if row["program"].startswith("training step")]
    samplers = [row for row in answer["programs"] if row["program"].startswith("sampler")]
    others = [row for row in answer["programs"] if row["program"].endswith("encoding")]
    hours = answer["hours"]["device_hours"]
    return (
        name,
        "; ".join(map(_step, steps)),
        "; ".join(f"{_bytes(row)}, {row['batch']} images" for row in samplers),
        max((_bytes(row) for row in others), key=lambda text: float(text.split()[0]) if text[0].isdigit() else 1e9),
        f"{hours:.3g}" if hours is not None else "-",
        "yes" if answer["fits"] else "no",
    )


def _step(row: dict[str, Any]) -> str:
    """Bytes of a training step, and what a run does to make it fit."""
    return f"{row['program'].rpartition(' ')[2]} {_bytes(row)}{_way(row)}"


def _way(row: dict[str, Any]) -> str:
    ways = [
        *(["split"] if row["fsdp"] else []),
        *(["remat"] if row["remat"] else []),
        *([f"{row['accumulate']} parts"] if row.get("accumulate", 1) > 1 else []),
    ]
    return f" ({', '.join(ways)})" if ways else ""


ALIGNING = "aligning step, "


def aligning_table(out: Path, model: str, names: Sequence[str]) -> str:
    """The Markdown table of a model's aligning steps: a row for each, a column for each target with an answer."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        if _file(out, model, name).exists():
            answer = json.loads(_file(out, model, name).read_text(encoding="utf-8"))
            steps = [row for row in answer["programs"] if row["program"].startswith(ALIGNING)]
            found[name] = {row["program"].removeprefix(ALIGNING): row for row in steps}
    known = dict.fromkeys(step for rows in found.values() for step in rows)
    if not known:
        return ""
    cells = [[step, *(_aligning(rows.get(step)) for rows in found.values())] for step in known]
    lines = [["aligning step", *found], ["---"] * (len(found) + 1), *cells]
    return "\n".join([f"{model}, GB on a device:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _aligning(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not asked"
    return f"{_bytes(row)}{_way(row)}" + ("" if row["fits"] else ", does not fit")


def _bytes(row: dict[str, Any]) -> str:
    """GB beside the limit, or why there are none."""
    if row["bytes"] is None:
        return row["reason"]
    return f"{row['bytes'] / 1e9:.3g} of {row['limit_bytes'] / 1e9:.3g}"


if __name__ == "__main__":
    main()
