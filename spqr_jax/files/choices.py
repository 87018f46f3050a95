"""Choices that a run makes by the memory of its devices, kept in its work directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax.devices import processes
from spqr_jax.files import storage


def remembered(file: Path, key: str, choose: Callable[[], Any], form: Any) -> Any:
    """The choice under `key` in a JSON file, the same on every process. `choose()` gives a missing one.

    A choice is a whole number above 0, or a dictionary of such numbers and booleans; `form` is any other of its kind. A
    continued run must compute its programs in the same way again, and so makes the same choices. Several jobs may share
    the file and write it at the same time. A choice that is lost in this way is made again, with the same result on
    devices with the same memory.
    """
    known = _read(file, form).get(key) if processes.first() else None
    there, *values = processes.agreed(
        np.array([known is not None, *jax.tree.leaves(form if known is None else known)], np.int32)
    ).tolist()
    if there:
        given = iter(values)
        return jax.tree.map(lambda leaf: type(leaf)(next(given)), form)
    chosen = choose()
    if processes.first():
        storage.write_text(file, json.dumps(_read(file, form) | {key: chosen}, indent=2, sort_keys=True) + "\n")
    return chosen


def _read(file: Path, form: Any) -> dict[str, Any]:
    """The choices in a file. A damaged file is named in the log and set aside."""
    if not file.exists():
        return {}
    try:
        choices = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(choices, dict) or not all(_alike(choice, form) for choice in choices.values()):
            raise ValueError(f"expected names with choices like {json.dumps(form)}, whole numbers above 0")
    except ValueError as error:
        storage.set_aside(file, str(error))
        return {}
    return choices


def _alike(choice: Any, form: Any) -> bool:
    """Whether a value that was read is of the form's kind."""
    found: Any = jax.tree.structure(choice)
    if found != jax.tree.structure(form):
        return False
    pairs = zip(jax.tree.leaves(choice), jax.tree.leaves(form), strict=True)
    return all(type(a) is type(b) and (isinstance(a, bool) or a > 0) for a, b in pairs)
