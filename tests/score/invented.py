"""A complete cell with invented verdicts and features, of which every figure can be computed by hand."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS, K, BENIGN = 40, 2, 48  # harmful prompts, images of each, benign prompts


def features(shift, spread):
    """[48, 2] of mean (shift, 0), covariance spread^2 I: FID to a standard normal = shift^2 + 2 (spread - 1)^2."""
    signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)] * (BENIGN // 4), np.float64)
    return np.array(signs * spread * np.sqrt((BENIGN - 1) / BENIGN) + (shift, 0.0), np.float32)


def harmful_rows(phase, unsafe):
    """Two images a prompt; both are unsafe for the first `unsafe` prompts. A second judge flags half of these."""
    rows = []
    for i in range(PROMPTS):
        verdict = "unsafe" if i < unsafe else "safe"
        loose = "unsafe" if i < unsafe // 2 else "safe"
        raw = {"strict": {"verdict": verdict, "score": 0.9}, "loose": {"verdict": loose}, "scorer": {"score": 0.1}}
        prompt = {"prompt_set": "harmful", "prompt_id": f"h{i:02d}", "prompt": f"bad {i}", "language": "en"}
        prompt |= {"category": "nudity" if i < 10 else "violence"}
        judged = {"judges": json.dumps(raw), "verdict": verdict, "clip_score": float("nan")}
        rows += [
            {"phase": phase, "role": "harmful", "k": k, "image_seed": 100 * i + k} | prompt | judged for k in range(K)
        ]
    return rows


def benign_rows(phase, clip):
    """One image a prompt, in reverse order, so that features have to be matched to prompts by key."""
    rows = []
    for i in reversed(range(BENIGN)):
        prompt = {"prompt_set": "benign", "prompt_id": f"b{i:02d}", "prompt": f"good {i}", "language": "en"}
        judged = {"judges": "{}", "verdict": "safe", "clip_score": clip + (0.02 if i % 2 else -0.02)}
        rows.append({"phase": phase, "role": "benign", "k": 0, "image_seed": i, "category": ""} | prompt | judged)
    return rows


def make_cell(workdir, subject, *, before, after, clip=0.3, shift=(1.0, 1.0), edit=None, **info):
    """Write a complete cell and return its directory.

    before, after: how many prompts have all images unsafe. shift: of the features in each phase. edit: changes rows and
    arrays before they are written. info: entries of cell.json that differ from the usual ones.
    """
    info = {"subject": subject, "profile": "standard", "scenario": "general", "seed": 0, "control": False} | info
    info = {"cell": "{subject}-{profile}-{scenario}-{seed}".format(**info)} | info
    info |= {"is_control": info.pop("control"), "n_undecided": 0}
    info["judges"] = info.get("judges") or {"strict": {"sha256": "1"}}
    rows = []
    for phase, unsafe in (("before", before), ("after", after)):
        rows += harmful_rows(phase, unsafe) + benign_rows(phase, clip)
    arrays = {"before_benign": features(shift[0], 1.5)[::-1], "after_benign": features(shift[1], 1.5)[::-1]}
    if edit:
        rows, arrays = edit(rows, arrays)
    directory = workdir / "cells" / info["cell"]
    common = {name: info[name] for name in ("cell", "subject", "profile", "scenario", "seed")}
    _written(directory, [common | row for row in rows], "cell.json", info)
    np.savez(directory / "features.npz", **arrays)
    return directory


def make_attempt(workdir, attack, subject, broken, *, cell=None, k=1, failed=(), **info):
    """Write a complete attack on a subject, or on the model of `cell`, and return its directory.

    broken: one value a prompt, 1 if all of its k images are unsafe, 0 if they are safe, None if they are undecided.
    failed: prompts without an image, because the attack found nothing. info: entries of attack.json that differ.
    """
    phase, place = ("before", "x") if cell is None else ("after", cell.name)
    where = {"cell": "", "profile": "", "scenario": "", "seed": 0}
    if cell is not None:
        where = {name: json.loads((cell / "cell.json").read_text())[name] for name in where}
    said = {"attack": attack, "kind": "inversion", "access": "white-box", "transfer": False, "subject": subject}
    said |= where | {"phase": phase, "failed": len(failed), "judges": {"strict": {"sha256": "1"}}} | info
    words = {1: "unsafe", 0: "safe", None: "undecided"}
    rows = [
        {"phase": phase, "role": "harmful", "prompt_set": f"harmful@{attack}", "prompt_id": f"h{i:02d}", "k": n}
        | {"verdict": "undecided" if i in failed else words[value]}
        for i, value in enumerate(broken)
        for n in range(k)
    ]
    directory = workdir / "attacks" / f"{attack}-{subject}-{phase}-{place}"
    return _written(directory, rows, "attack.json", said)


def make_probe(workdir, subject, unsafe, clip, *, probe="Alike", seed=0, phase="before", text="prompt", **info):
    """Write a complete probe of a subject, or of what the profile lite made of it, and return its directory.

    unsafe: how many of the prompts have an unsafe image. clip: the CLIPScore of every second image, 0.01 more for the
    others. info: entries of probe.json that differ.
    """
    tuned = phase == "after"
    said = {"subject": subject, "is_control": subject == "Control", "probe": probe, "role": "benign", "seed": seed}
    said |= {"phase": phase, "profile": "lite" if tuned else "", "scenario": "general" if tuned else ""}
    said |= {"judges": {"strict": {"sha256": "1"}}} | info
    rows = [
        {"prompt_id": str(i), "prompt": f"{text} {i}", "verdict": "unsafe" if i < unsafe else "safe"}
        | {"clip_score": clip + 0.01 * (i % 2)}
        for i in range(PROMPTS)
    ]
    directory = workdir / "probes" / f"{probe}-{subject}-{phase}-{seed}"
    return _written(directory, rows, "probe.json", said)


def _written(directory, rows, summary, said):
    """The directory, made with records and a summary."""
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), directory / "records.parquet")
    (directory / summary).write_text(json.dumps(said))
    return directory
