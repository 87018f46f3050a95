"""What the config in a manifest says that a submission must hold: its cells, and the values of its fields."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from spqr_jax.config import Config


def config_of(manifest: Mapping[str, Any]) -> Config:
    """The resolved config of a manifest. Raises ValueError naming the field for a value of another type."""
    return _built(Config, manifest["config"], "config")


def _built(kind: type, values: Any, place: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{place} must be an object, found {type(values).__name__}")
    hints = get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)} - {"sources"}
    if wrong := sorted(fields ^ values.keys()):
        raise ValueError(f"{place}.{wrong[0]} is {'missing' if wrong[0] in fields else 'no field of this version'}")
    return kind(**{name: _value(hints[name], values[name], f"{place}.{name}") for name in fields})


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of JSON as a field of this type holds it."""
    origin, parts = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _built(hint, value, place)
    if origin is tuple and isinstance(value, list):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(kinds) == len(value):
            return tuple(_value(kind, v, f"{place}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: v if parts[1] is Any else _value(parts[1], v, f"{place}.{key}") for key, v in value.items()}
    elif hint in (Any, type(value)) or (hint is float and type(value) is int):
        return value
    raise ValueError(f"{place} must be {getattr(hint, '__name__', hint)}, found {type(value).__name__}")


def cells_faults(config: Config, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells that a config asks for and that are not there, those that it does not ask for, and doubles, as lines.

    cells: cell.json of each.
    """
    bft = config.bft
    asked = set(product((s.name for s in config.subjects), bft.profiles, bft.scenarios, bft.seeds))
    found = Counter((c["subject"], c["profile"], c["scenario"], c["seed"]) for c in cells)

    def told(cell: tuple[Any, ...]) -> str:
        return "{} x {} x {} x seed {}".format(*cell)

    faults = [f"cell {told(cell)} is missing, which the config names" for cell in sorted(asked - found.keys())]
    faults += [f"cell {told(cell)} is not named by the config" for cell in sorted(found.keys() - asked, key=str)]
    return faults + [f"cell {told(cell)} is there {n} times" for cell, n in sorted(found.items(), key=str) if n > 1]
