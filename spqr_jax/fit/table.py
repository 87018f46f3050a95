"""The answer as text for a terminal: a table of programs, what was tried, and the arithmetic of the hours."""

from collections.abc import Iterator
from typing import Any

HEAD = ("program", "batch", "fits", "GB", "of GB", "arguments + temporaries", "TFLOP a device", "compiled in")


def text(answer: dict[str, Any]) -> str:
    """The whole answer of `spqr_jax.fit.fitting.answer`."""
    devices = f"{answer['devices']} x {answer['device_kind']}"
    title = f"{answer['base']} in {answer['dtype']} on {answer['target']} ({devices}); compiled, not run."
    rows = [HEAD, *(_row(row) for row in answer["programs"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [line for row in answer["programs"] for line in _notes(row)]
    stored = [*_stored("Disk", answer["disk"]), *_stored("Memory of the host", answer["host"])]
    left_out = f"Not compiled: {'; '.join(answer['not_compiled'])}."
    return "\n".join([title, *table, *notes, left_out, *stored, *_hours(answer["hours"], answer["devices"])])


def _stored(where: str, needed: dict[str, Any]) -> Iterator[str]:
    """What lies there, as number x bytes, and the sum."""
    yield f"{where}, at most:"
    for item in needed["items"]:
        number, size = item["number"], item["bytes"]
        yield f"  {item['what']}: {number:,} x {size:,} bytes = {_gb(number * size)} GB"
    yield f"  together {_gb(needed['bytes'])} GB. Left out: {needed['left_out']}."


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    parts = row["parts"]
    split = f"{_gb(parts['arguments'])} + {_gb(parts['temporaries'])}" if parts else "-"
    how = [*(["plan"] if row["until"] == "plan" else []), *(["kept"] if row["cached"] else [])]
    seconds = f"{row['compile_s']:.1f} s" + (f" ({', '.join(how)})" if how else "")
    fits = "yes" if row["fits"] else "NO"
    flops = f"{row['flops'] / 1e12:.3g}" if row["flops"] else "-"
    return row["program"], str(row["batch"]), fits, _gb(row["bytes"]), _gb(row["limit_bytes"]), split, flops, seconds


def _gb(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:.3g}"


def _notes(row: dict[str, Any]) -> Iterator[str]:
    """What a program consists of, why it does not compile, what was tried, and what helped."""
    if row.get("hlo"):
        yield f"{row['program']}: {', '.join(_consists(row['hlo'], row['dtype']))}."
    if row["reason"]:
        yield f"{row['program']}: {row['reason']}"
    if row["note"]:
        yield f"{row['program']}: {row['note']}."
    for trial in row.get("tried", ()):
        how = ", ".join(f"{name} {trial[name]}" for name in ("batch", "accumulate", "remat", "fsdp") if name in trial)
        found = f"{_gb(trial['bytes'])} GB" if trial["bytes"] is not None else trial["reason"]
        yield f"{row['program']}: tried {how}: {'fits' if trial['fits'] else 'does not fit'}, {found}."
    if row["fits"] and "remat" in row and row.get("tried"):
        how = ", ".join(f"{name} {row[name]}" for name in ("accumulate", "remat", "fsdp") if name in row)
        yield f"{row['program']}: a run computes it with {how}."
    if row.get("remedy"):
        yield f"{row['program']}: remedy: {row['remedy']}"
    elif not row["fits"] and row.get("tried"):
        yield f"{row['program']}: nothing that was tried fits; split the weights (mesh.fsdp), or take more memory."


def _consists(hlo: dict[str, Any], dtype: str) -> Iterator[str]:
    """The short form of `spqr_jax.fit.hlo.counts`."""
    if "flash" in hlo:
        yield "flash attention {forward} forward, {backward} backward".format(**hlo["flash"])
    if hlo["plain"]:
        most = hlo["plain"][0]
        number = sum(entry["number"] for entry in hlo["plain"])
        yield f"plain attention {number}, at most {most['queries']} queries of {most['keys']} keys"
    if dtype != "float32":
        left, flop = hlo["products"].get("f32"), sum(kind["flop"] for kind in hlo["products"].values())
        yield f"left in float32: {left['flop'] / flop:.2g} of the FLOP ({left['largest']})" if left else "no float32"
    for kind, found in hlo.get("collectives", {}).items():
        yield f"{kind} {found['number']} ({_gb(found['bytes'])} GB)"
    if "transposes" in hlo:
        yield f"transposes {hlo['transposes']['number']}, copies {hlo['copies']['number']}"
        yield f"donated arguments {hlo['donated']}"


def _hours(hours: dict[str, Any], devices: int) -> Iterator[str]:
    """Each kind of work as number x FLOP, and the sum over the rate."""
    if hours["device_hours"] is None:
        why = "the peak of this target is not known" if not hours["peak_flops"] else "a program was not traced"
        yield f"Device-hours: not estimated, since {why}."
        return
    rate = hours["peak_flops"] * hours["share_of_peak"]
    yield (
        f"Device-hours at {hours['share_of_peak']:g} of the peak of {hours['peak_flops'] / 1e12:g} TFLOP/s "
        f"({hours['peak_source']}), {rate / 1e12:.3g} TFLOP/s:"
    )
    for item in hours["work"]:
        yield f"  {item['what']}: {item['number']:,} x {item['flop'] / 1e12:.4g} TFLOP = {item['hours']:.3g} h"
    total = hours["device_hours"]
    yield f"  together {total:.3g} device-hours, {total / devices:.3g} h on {devices}. Left out: {hours['left_out']}."
