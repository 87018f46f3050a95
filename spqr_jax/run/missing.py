"""Everything that a config names, opened at once, so that one table says all that is not there or does not open."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from judges.session import JudgeError
from spqr_jax import data, profiles, protocols
from spqr_jax import prompts as prompts_lib
from spqr_jax.config import Config
from spqr_jax.data import Dataset
from spqr_jax.files.records import ROLES
from spqr_jax.pipeline import Pipeline
from spqr_jax.prompts import Prompt
from spqr_jax.run import identity, jury, names
from spqr_jax.run.jury import Jury

ERRORS = (OSError, ValueError, JudgeError, ModuleNotFoundError)  # what openers raise for a thing that does not open
LARGE = 2**28  # bytes of a judge's files above which it is opened only if nothing else is missing


class Thing(NamedTuple):
    """A thing that a config names.

    Attributes:
        field: the config's field, "judges.safety.nudenet".
        place: its path, or its name where it finds its own files ("nudenet:v2").
        look: finds out in little time whether it can be opened. Raises one of `ERRORS`.
        open: opens it whole; None if looking did, and then `look` returns the opened thing.
    """

    field: str
    place: str
    look: Callable[[], Any]
    open: Callable[[], Any] | None = None


class Opened(NamedTuple):
    """All that a config names, opened.

    Attributes:
        backbone: the unaligned pipeline.
        checkpoints: checkpoint of a subject, as the config has it -> its path.
        prompts: role -> prompts.
        probes: name of a probe -> prompts.
        data: scenario -> fine-tuning images.
        jury: the judges.
        adapters: profile "adapter:NAME" -> the path of its file.
        few_pictures: the pictures that dreambooth and textual_inversion learn, if the config has one of them.
    """

    backbone: Pipeline
    checkpoints: dict[str, Path]
    prompts: dict[str, list[Prompt]]
    probes: dict[str, list[Prompt]]
    data: dict[str, Dataset]
    jury: Jury
    adapters: dict[str, Path]
    few_pictures: Dataset | None


class Fault(NamedTuple):
    """A thing that is not there or does not open: its field and place, what is wrong, and where to get it."""

    field: str
    place: str
    reason: str
    source: str


class MissingFiles(FileNotFoundError):
    """Raised with all faults of the things that a config names. Its text is their table."""

    def __init__(self, faults: Sequence[Fault]):
        super().__init__(table(faults))
        self.faults = tuple(faults)


def open_all(config: Config) -> Opened:
    """Open all that a checked config names. Raises MissingFiles with everything that cannot be opened.

    At first everything is only looked at, which reads no weights, no images and no large judge. If nothing is missing,
    the rest is read.
    """
    listed = tuple(things(config))
    looked = _each({thing: thing.look for thing in listed}, config.sources)
    whole = _each({thing: thing.open for thing in listed if thing.open}, config.sources)
    opened = {thing.field: value for thing, value in (looked | whole).items()}
    judges = {field: opened[f"judges.{field}"] for field in jury.openers(config.judges)}
    return Opened(
        backbone=opened["base"],
        checkpoints={s.checkpoint: opened[f"subjects[{s.name}].checkpoint"] for s in config.subjects if s.checkpoint},
        prompts={role: opened[f"prompts.{role}"] for role in ROLES},
        probes={probe.name: opened[f"probes[{probe.name}]"] for probe in config.probes},
        data={scenario: opened[f"bft.data.{scenario}"] for scenario in config.bft.scenarios},
        jury=jury.of_opened(config.judges, judges),
        adapters={p: opened[f"bft.profiles[{p}]"] for p in config.bft.profiles if protocols.adapter_of(p)},
        few_pictures=opened.get("bft.own.pictures"),
    )


def _each(work: Mapping[Thing, Callable[[], Any]], sources: Mapping[str, str]) -> dict[Thing, Any]:
    """thing -> what its work returns. Raises MissingFiles with all whose work raises one of `ERRORS`."""
    done, faults = {}, []
    for thing, of_thing in work.items():
        try:
            done[thing] = of_thing()
        except ERRORS as error:
            faults.append(_fault(thing, error, sources))
    if faults:
        raise MissingFiles(_joined(faults))
    return done


# --- the things


def things(config: Config) -> Iterator[Thing]:
    """All that a config names: the backbone, subjects' weights and images, prompts, data, judges, reference images."""
    yield Thing("base", config.base, partial(names.look_at_weights, config.base), partial(names.backbone, config))
    for subject in config.subjects:
        where = f"subjects[{subject.name}]"
        if weights := subject.checkpoint:
            look, path = partial(names.look_at_weights, weights), partial(names.weights_path, weights)
            yield Thing(f"{where}.checkpoint", weights, look, path)
        for option, source in identity.sources(subject).items():
            yield from _data(f"{where}.options.{option}", source)
    for role in ROLES:
        yield _prompts(f"prompts.{role}", getattr(config.prompts, role), partial(names.prompts, config, role))
    for probe in config.probes:
        yield _prompts(f"probes[{probe.name}]", probe.prompts, partial(names.probe_prompts, config, probe))
    for scenario in config.bft.scenarios:
        field, source = f"bft.data.{scenario}", names.data_source(config, scenario)
        yield from _data(field, source)
        yield Thing(field, source.partition("?")[0], lambda: None, partial(names.dataset, config, scenario))
    yield from _of_adaptations(config)
    for field, judge in jury.openers(config.judges).items():
        yield _judge(f"judges.{field}", judge)
    yield Thing("judges.reference", config.judges.reference, partial(names.reference_paths, config))


def _prompts(field: str, source: str, read: Callable[[], list[Prompt]]) -> Thing:
    return Thing(field, str(prompts_lib.path_of(source)) if names.in_mini(source) is None else source, read)


def _of_adaptations(config: Config) -> Iterator[Thing]:
    """The files of adapters, and the few pictures of one thing."""
    for profile in config.bft.profiles:
        if name := protocols.adapter_of(profile):
            place, path = config.bft.own.adapters.get(name, name), partial(names.adapter_path, config, name)
            yield Thing(f"bft.profiles[{profile}]", place, partial(names.look_at_weights, place), path)
    if set(config.bft.profiles) & set(profiles.OF_FEW_PICTURES):
        place = config.bft.own.pictures
        yield from _data("bft.own.pictures", place)
        yield Thing("bft.own.pictures", place.partition("?")[0], lambda: None, partial(names.few_pictures, config))


def _data(field: str, source: str) -> Iterator[Thing]:
    """The data sets of a mixture, each with the folder of its images if that lies elsewhere."""
    for part in data.parts(source) if names.in_mini(source) is None else ():
        place, folder = data.places(part)
        if folder is None or folder.is_dir() or not place.exists():  # else its reader names the same folder again
            yield Thing(field, str(place), partial(data.open_source, part))
        if folder is not None:
            yield Thing(field, str(folder), partial(_check_folder, folder))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; name the folder of the images with ?images=DIR.")


def _judge(field: str, judge: jury.Opener) -> Thing:
    """A judge. Its opener reads its files whole, so a large one is only looked for at first."""
    path = Path(judge.place or "nowhere")
    files = path.glob("**/*.onnx*") if path.is_dir() else [path]
    if sum(file.stat().st_size for file in files if file.is_file()) > LARGE:
        return Thing(field, judge.place, lambda: None, judge.open)
    return Thing(field, judge.place, judge.open)


# --- the faults


def _fault(thing: Thing, error: Exception, sources: Mapping[str, str]) -> Fault:
    """The fault that an error tells. Messages have the form "PLACE: what is wrong; the remedy"."""
    wrong, _, remedy = str(error).partition("; ")
    _, found, rest = wrong.rpartition(thing.place or wrong)
    reason = (rest.lstrip("/:' ").rstrip("/: ") if found else "") or wrong
    return Fault(thing.field, thing.place, reason.rstrip("."), source_of(thing.place, sources) or remedy.rstrip("."))


def source_of(place: str, sources: Mapping[str, str]) -> str:
    """Where to get a place: the entry of the place itself, or of the nearest folder above it; "" if there is none."""
    path = Path(place)
    known = {Path(key): source for key, source in sources.items()}
    return next((known[folder] for folder in (path, *path.parents) if folder in known), "")


def _joined(faults: Iterable[Fault]) -> list[Fault]:
    """The faults without repetition. Those of one place that differ in their fields alone become one."""
    fields: dict[tuple[str, ...], list[str]] = {}
    for field, *what in faults:
        fields.setdefault(tuple(what), []).append(field)
    return [Fault(", ".join(dict.fromkeys(named)), *what) for what, named in fields.items()]


def table(faults: Sequence[Fault]) -> str:
    """The faults as a table: place, reason and field, and below each where to get it."""
    heads = Fault("config field", "place", "", "")
    widths = [max(len(fault[column]) for fault in (heads, *faults)) for column in (0, 1)]
    lines = [f"{len(faults)} of the things that the config names are not there or do not open:", ""]
    for fault in (heads._replace(reason="fault, and below it where to get the thing"), *faults):
        lines.append(f"{fault.field:{widths[0]}}  {fault.place:{widths[1]}}  {fault.reason}".rstrip())
        if fault.source:
            lines.append(f"{'':{widths[0]}}  from: {fault.source}")
    return "\n".join(lines)
