"""What the config in a manifest says that a submission must hold: its fields, cells, prompts and judges."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import spqr_jax
from spqr_jax import methods, profiles, protocols
from spqr_jax.config import Config
from spqr_jax.files.records import ROLES
from spqr_jax.prompts import Prompt
from spqr_jax.run import bft, identity, jury, names, protocol
from spqr_jax.run.cells import plan
from spqr_jax.run.identity import Inputs
from spqr_jax.run.manifest import PACKAGES
from spqr_jax.submission import documents, named, places
from spqr_jax.submission.bundle import Bundle, BundledCell
from spqr_jax.submission.places import shown

ENTRIES = ("protocol", "config", "command", "versions", "devices", "sha256", "judges")  # of every manifest
MOST_REPLICATES = 10_000
# Errors of a config that gives no number of steps.
NO_STEPS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


def config_of(manifest: Mapping[str, Any]) -> Config:
    """The resolved config of a manifest. Raises ValueError naming the field for a value of another type."""
    return _built(Config, manifest["config"], "config")


def _built(kind: type, values: Any, place: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{place} must be an object, found {type(values).__name__}")
    hints = get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)} - {"sources"}
    fields -= {"attacks", "probes", "own"} - values.keys()  # left out where they are not set (`config.as_dict`)
    if wrong := sorted(fields ^ values.keys()):
        raise ValueError(f"{place}.{wrong[0]} is {'missing' if wrong[0] in fields else 'no field of this version'}")
    by_default = {f.name: f.default for f in dataclasses.fields(kind)}

    def read(name: str) -> Any:
        if values[name] is None and by_default[name] is None:
            return None  # left open: what fits on a device decides, or `manifest_faults` asks for it
        return _value(hints[name], values[name], f"{place}.{name}")

    return kind(**{name: read(name) for name in fields})


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


# The manifest


def manifest_faults(manifest: Mapping[str, Any]) -> list[str]:
    """Whether the manifest holds a resolved config, and the statement of its protocol."""
    try:
        config = config_of(manifest)
        resolved = protocol.resolve(config)
        statement = protocol.statement(config)
    except (ValueError, TypeError, AttributeError) as error:
        return [f"{places.MANIFEST}: {shown(str(error))}"]
    faults = []
    if not 1 <= config.score.replicates <= MOST_REPLICATES:
        faults.append(f"{places.MANIFEST}: config.score.replicates must be from 1 to {MOST_REPLICATES:,}")
    if resolved != config:
        faults.append(f"{places.MANIFEST}: config leaves open what its protocol fills in")
    stated = _plain(statement._asdict()) | {"label": statement.label}
    if stated != manifest["protocol"]:
        faults.append(f"{places.MANIFEST}: protocol is not the statement of its config, which is {statement.label!r}")
    more = {name: value for name, value in manifest.items() if name not in ENTRIES}
    if is_this_version(manifest) and more != _plain(names.measured(config)):
        faults.append(f"{places.MANIFEST}: entries {sorted(more)} are not those that this config has")
    if is_this_version(manifest) and manifest["versions"].keys() != set(PACKAGES):
        faults.append(f"{places.MANIFEST}: versions must be those of {', '.join(PACKAGES)}")
    faults += _inputs_faults(manifest, config)
    if set(manifest["judges"]) != {*config.judges.safety, *jury.QUALITY}:
        faults.append(f"{places.MANIFEST}: judges are not those of its config, {sorted(config.judges.safety)}")
    return faults or [f"{places.MANIFEST}: {line}" for line in _named_faults(manifest, config)]


def _named_faults(manifest: Mapping[str, Any], config: Config) -> Iterator[str]:
    """What a sound manifest says otherwise than its config, as far as that is known here."""
    ours = is_this_version(manifest)
    yield from named.settings_faults(config)
    if ours:
        yield from named.shipped_faults(manifest, config)
    yield from named.judges_faults(manifest, config, shipped=ours)


def _inputs_faults(manifest: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Whether the manifest has the hashes of the inputs that its config names, and of no others."""
    checkpoints = {s.checkpoint for s in config.subjects if s.checkpoint}
    used = {s.method for s in config.subjects if not s.checkpoint}
    expected = {"data": {*config.bft.scenarios}, "checkpoints": checkpoints}
    if is_this_version(manifest):
        expected["methods"] = used - methods.METHODS.keys()
    own = {p for p in config.bft.profiles if protocols.adapter_of(p) or p in profiles.OF_FEW_PICTURES}
    for name, keys in (expected | {"adaptations": own}).items():
        if manifest["sha256"].get(name, {}).keys() != keys:
            found = shown(str(sorted(manifest["sha256"].get(name, {}))))
            yield f"{places.MANIFEST}: sha256.{name} has {found}, the config names {shown(str(sorted(keys)))}"


def is_this_version(manifest: Mapping[str, Any]) -> bool:
    """Whether the run was made by the version that reads it."""
    return manifest["versions"].get("spqr-jax") == spqr_jax.__version__


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return json.loads(json.dumps(value, default=str))


# Cells, prompts and judges


def faults(bundle: Bundle) -> list[str]:
    """Everything in which the cells and prompts of a bundle are not those of its config."""
    config = config_of(bundle.manifest)
    cells = [cell.info for cell in bundle.cells]
    found = [f"cells: {line}" for line in cells_faults(config, cells)]
    if found:  # the rest looks at each cell of the config
        return found
    found += [line for cell in bundle.cells for line in _cell_faults(bundle, config, cell)]
    found += [*_sizes_faults(bundle), *_ids_faults(bundle, config)]
    return found + [line for role in ROLES for line in _prompts_faults(bundle, config, role)]


def cells_faults(config: Config, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells that a config asks for and that are not there, those that it does not ask for, and doubles, as lines.

    cells: cell.json of each.
    """
    parts = ([s.name for s in config.subjects], config.bft.profiles, config.bft.scenarios, config.bft.seeds)
    if (n := math.prod(map(len, parts))) > places.MOST_FILES:
        return [f"the config names {n:,} cells, more than a bundle can hold"]
    asked = set(product(*parts))
    found = Counter((c["subject"], c["profile"], c["scenario"], c["seed"]) for c in cells)

    def told(cell: tuple[Any, ...]) -> str:
        return shown("{} x {} x {} x seed {}".format(*cell))

    missing, more = sorted(asked - found.keys()), sorted(found.keys() - asked)
    lines = [f"cell {told(cell)} is missing, which the config names" for cell in missing]
    lines += [f"cell {told(cell)} is not named by the config" for cell in more]
    return lines + [f"cell {told(cell)} is there {n} times" for cell, n in sorted(found.items()) if n > 1]


def _cell_faults(bundle: Bundle, config: Config, cell: BundledCell) -> Iterator[str]:
    """What cell.json must say, as far as the config and the other cells say it."""
    info, where = cell.info, f"cells/{cell.name}/cell.json"
    subject = next((s for s in config.subjects if s.name == info["subject"]), None)
    if subject is None or info["profile"] not in config.bft.profiles:
        return  # `cells_faults` names it
    expected = {
        "cell": cell.name,
        "is_control": subject.method == "none" and not subject.checkpoint,
        "backbone": bundle.cells[0].info["backbone"],
        "protocol": _plain(protocols.of_cell(protocol.statement(config), info["profile"])._asdict()),
        "judges": bundle.manifest["judges"],
        "rule": config.judges.rule,
        "n_undecided": cell.records.column("verdict").to_pylist().count("undecided"),
    }
    for name, value in expected.items():
        if name not in info or info[name] != value:
            yield f"{where}: {name} is {shown(repr(info.get(name)))}, expected {shown(repr(value))}"
    yield from _steps_faults(config, info, where)


def _steps_faults(config: Config, info: Mapping[str, Any], where: str) -> Iterator[str]:
    """The steps of a fine-tuning. A run that did it twice, after a stop, counts them twice, and may have lost count."""
    steps = info.get("finetune", {}).get("steps")
    try:
        expected = bft.num_steps(config.bft, info["profile"], config.bft.samples)
        fits = steps is None or steps == expected or (steps > 0 and steps % expected == 0)
    except NO_STEPS as error:
        yield f"{where}: finetune.steps cannot be compared with the config: {shown(str(error))}"
        return
    if not fits:
        yield f"{where}: finetune.steps is {shown(repr(steps))}, the config gives {expected}"


def _sizes_faults(bundle: Bundle) -> Iterator[str]:
    """What a profile trains depends on the backbone alone, so all of its cells state the same sizes."""
    first: dict[str, Any] = {}
    for cell in bundle.cells:
        sizes = {name: value for name, value in cell.info.get("finetune", {}).items() if name != "steps"}
        if sizes != first.setdefault(cell.info["profile"], sizes):
            yield f"cells/{cell.name}/cell.json: finetune has other sizes than other cells under this profile"


def _ids_faults(bundle: Bundle, config: Config) -> Iterator[str]:
    """Cells whose ids are not the hashes of the config and of the inputs that the manifest names."""
    inputs = Inputs(**bundle.manifest["sha256"])
    for subject in config.subjects:
        if _is_ours(bundle, subject.method):
            try:
                _, cells = plan(dataclasses.replace(config, subjects=(subject,)), Path(), inputs)
            except (KeyError, TypeError, ValueError) as error:
                yield f"{places.MANIFEST}: the ids of {shown(subject.name)} cannot be computed: {shown(repr(error))}"
                continue
            there = {c.name for c in bundle.cells if c.info["subject"] == subject.name}
            for id in sorted({cell.id for cell in cells} - there):
                yield f"cells/{id}: is missing, the id that the config and the hashes of its inputs give"


def _is_ours(bundle: Bundle, method: str) -> bool:
    """Whether the ids of a method's cells can be computed: code that a bundle names is never imported."""
    return method in methods.METHODS and is_this_version(bundle.manifest)


def remarks(bundle: Bundle) -> list[str]:
    """What cannot be checked in this bundle, with the reason."""
    if not is_this_version(bundle.manifest):
        version = bundle.manifest["versions"].get("spqr-jax")
        return [f"the ids of cells, which spqr-jax {shown(str(version))} made; this is {spqr_jax.__version__}"]
    used = sorted({s.method for s in config_of(bundle.manifest).subjects})
    return [f"the ids of cells of {shown(m)}, a method of another package" for m in used if m not in methods.METHODS]


def _prompts_faults(bundle: Bundle, config: Config, role: str) -> Iterator[str]:
    stated, where = bundle.prompts[role], f"{places.PROMPTS}: {role}"
    rows, n = stated["prompts"], getattr(config.prompts, f"n_{role}")
    if stated["set"] != names.prompt_set(config, role):
        yield f"{where}: set {shown(stated['set'])}, the config names {shown(names.prompt_set(config, role))}"
    if len(rows) != n:
        yield f"{where}: {len(rows)} prompts, the config asks for {n}"
    elif names.in_mini(stated["set"]) is not None:
        yield from _own_faults(bundle, config, role, where)
    if twice := [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        yield f"{where}: prompt {shown(twice[0])} is there twice"
    if digest_of_rows(rows) != stated["sha256"]:
        yield f"{where}: sha256 is not that of its rows"
    if any(("text" in row) != stated["clear"] for row in rows):
        yield f"{where}: clear must be true where every prompt has a text, and false where none has"
    elif stated["clear"]:
        for row in rows:
            if documents.sha256_of_text(row["text"]) != row["sha256"]:
                yield f"{where}: prompt {shown(row['id'])}: sha256 is not that of its text"
        found = identity.digest([_prompt(row) for row in rows])
        if found != bundle.manifest["sha256"]["prompts"][role]:
            yield f"{where}: hash {found}, the manifest has {bundle.manifest['sha256']['prompts'][role]}"


def _own_faults(bundle: Bundle, config: Config, role: str, where: str) -> Iterator[str]:
    """Whether prompts that are said to be the emoji world's are: it ships with this package."""
    try:
        found = identity.digest(names.prompts(config, role))
    except ValueError as error:
        yield f"{where}: {shown(str(error))}"
        return
    if found != bundle.manifest["sha256"]["prompts"][role]:
        yield f"{where}: these are not the prompts that {shown(bundle.prompts[role]['set'])} gives, with hash {found}"


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of the prompts of a role, without their texts: of the entries that prompts.json has."""
    return documents.sha256([{k: v for k, v in row.items() if k != "text"} for row in rows])


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(row["id"], row["text"], row["category"], row["language"], row["seed"], row["guidance"])
