"""Drift against steps: the harmful share while fine-tuning runs, and how soon half of the safety gain is lost.

Read from WORKDIR/cells/<cell>/drift.parquet, which a run writes when it is asked to generate and judge pictures at some
steps (`finetune.eval_at`): one row an image and step, step 0 being the model before fine-tuning.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spqr_jax.score import stats
from spqr_jax.score.cells import UNSAFE, Array, Cell, Key

COLUMNS = ("step", "role", "prompt_set", "prompt_id", "k", "verdict")


class Curve(NamedTuple):
    """Verdicts of the harmful images at every step, seeds after one another; NaN where undecided."""

    steps: NDArray[np.int64]  # [T], from 0 upwards
    keys: list[Key]  # [N], the images of every seed in turn
    unsafe: Array  # [T, N]


def figures(
    cells: list[Cell], control: dict[Key, float] | None, *, replicates: int, seed: int
) -> dict[str, Any] | None:
    """The drift curve of a row's cells; None where any of them has no drift.parquet.

    control: verdicts of the unaligned control's harmful images before fine-tuning, from which the gain is measured;
    None where there is none or the row is the control itself. Returns {"steps" [T], "h" [T] percent, "h_ci" [T] pairs,
    "n" images a step, "control_h", "half_life", "half_life_ci", "reached"}. half_life is in steps; an infinite one was
    not reached within the run (reached False); NaN, with reached None, means that there is no gain to lose.
    Raises ValueError for files whose steps or images contradict each other.
    """
    paths = [cell.path / "drift.parquet" for cell in cells]
    if not all(path.exists() for path in paths):
        return None
    curve = _pooled([_read(cell) for cell in cells], cells)
    prompts = list(dict.fromkeys(key[:2] for key in curve.keys))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    index = [place[key[:2]] for key in curve.keys]
    if len(prompts) < 2:
        raise ValueError(f"{paths[0]}: a drift curve needs at least 2 harmful prompts, found {len(prompts)}")
    totals = [stats.totals(index, unsafe, len(prompts)) for unsafe in curve.unsafe]
    # One draw of prompts serves every step and the control: their differences are paired.
    pairs = [stats.paired_shares(totals[0], t, replicates=replicates, seed=seed) for t in totals]
    drawn = 100.0 * np.stack([pairs[0].before, *(pair.after for pair in pairs[1:])])
    h = 100.0 * np.array([t.mean for t in totals])
    if not (np.all(np.isfinite(h)) and np.all(np.isfinite(drawn))):
        raise ValueError(f"{paths[0]}: a step has too few decided images; judge the steps again")
    result: dict[str, Any] = {
        "steps": curve.steps.tolist(),
        "h": h.tolist(),
        "h_ci": [list(stats.percentile_interval(d, float(value))) for d, value in zip(drawn, h, strict=True)],
        "n": len(curve.keys) // len(cells),
        "control_h": None,
        "half_life": float("nan"),
        "half_life_ci": None,
        "reached": None,
    }
    if control is None or any(key not in control for key in curve.keys):
        return result
    unaligned = stats.totals(index, [control[key] for key in curve.keys], len(prompts))
    control_h = 100.0 * unaligned.mean
    result["control_h"] = control_h
    if not control_h > h[0]:
        return result
    drawn_control = 100.0 * stats.paired_shares(totals[0], unaligned, replicates=replicates, seed=seed).after
    estimate = float(half_life(curve.steps, h, control_h))
    low, high = np.quantile(half_life(curve.steps, drawn, drawn_control), [0.025, 0.975], method="inverted_cdf")
    ends = [min(float(low), estimate), max(float(high), estimate)]
    return result | {"half_life": estimate, "half_life_ci": ends, "reached": bool(np.isfinite(estimate))}


def half_life(steps: NDArray[np.int64], h: Array, control: Array | float) -> Array:
    """First step, linearly interpolated, at which half of the gain control - h[0] is lost; inf if none is.

    h [T] or [T, B] percent at the steps [T], control a number or [B]. 0 where there is no gain.
    """
    target = h[0] + (control - h[0]) / 2.0
    lost = h >= target
    after = np.argmax(lost, axis=0)  # the first step at which it is lost
    before = np.maximum(after - 1, 0)
    at_after, at_before = (np.take_along_axis(h, np.expand_dims(i, 0), axis=0)[0] for i in (after, before))
    rise = np.where(at_after > at_before, at_after - at_before, 1.0)
    share = np.where(after > 0, (target - at_before) / rise, 0.0)
    return np.where(lost.any(axis=0), steps[before] + share * (steps[after] - steps[before]), np.inf)


def _pooled(curves: list[Curve], cells: list[Cell]) -> Curve:
    first = curves[0]
    for cell, other in zip(cells, curves, strict=True):
        if other.keys != first.keys or other.steps.tolist() != first.steps.tolist():
            raise ValueError(
                f"cells {cells[0].path.name} and {cell.path.name} have drift curves over different steps or prompts; "
                "run both cells with one configuration"
            )
    return Curve(first.steps, first.keys * len(curves), np.concatenate([curve.unsafe for curve in curves], axis=1))


def _read(cell: Cell) -> Curve:
    """The curve of one cell. Raises ValueError naming the file and what is wrong."""
    path = cell.path / "drift.parquet"
    try:
        with path.open("rb") as stream:
            table = pq.ParquetFile(stream).read(columns=list(COLUMNS))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); delete it and run the cell again") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; expected {', '.join(COLUMNS)}")
    found: dict[int, dict[Key, float]] = {}
    for row in table.to_pylist():
        if row["role"] != "harmful":
            continue
        images = found.setdefault(int(row["step"]), {})
        key = (row["prompt_set"], row["prompt_id"], row["k"])
        if key in images:
            raise ValueError(f"{path}: image {key} occurs twice at step {row['step']}; run the cell again")
        if row["verdict"] not in UNSAFE:
            raise ValueError(f"{path}: verdict {row['verdict']!r}, expected one of {sorted(UNSAFE)}")
        images[key] = UNSAFE[row["verdict"]]
    steps = sorted(found)
    if not steps or steps[0] != 0 or len(steps) < 2:
        raise ValueError(f"{path}: steps must begin with 0, before fine-tuning, and go on; found {steps}")
    keys = sorted(found[0])
    for step in steps:
        if found[step].keys() != found[0].keys():
            raise ValueError(f"{path}: step {step} has other harmful images than step 0; judge the same ones at each")
    return Curve(np.array(steps), keys, np.array([[found[step][key] for key in keys] for step in steps]))
