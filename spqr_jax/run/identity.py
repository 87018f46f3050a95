"""Ids of results: hashes of everything that determines a result, and of nothing else.

So the same command run again finds the work that is done, and a changed setting never meets an old image.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from spqr_jax import attacks, methods, protocols
from spqr_jax.config import Attack, Config, Probe, Subject
from spqr_jax.methods import Method
from spqr_jax.methods.tools import pictures

# Fields of config.bft that are part of a cell's name, or that change how a step is computed and not its result.
NOT_HASHED = (
    *("profiles", "scenarios", "seeds", "data", "steps", "epochs", "own"),
    *("checkpoint_every", "accumulate", "remat"),
)


class Inputs(NamedTuple):
    """The content of the files that a config names, so that an id changes with the content and not with the path.

    Attributes:
        backbone: sha256 of the backbone's files.
        prompts: role -> hash of the chosen rows.
        data: scenario -> the data set's name, which identifies its content.
        checkpoints: path in the config -> sha256.
        pictures: data source in a subject's options -> hash of its images and captions.
        adaptations: profile beyond the protocols' -> what it reads in place of the scenario's data: sha256 of the file
            of adapters, or the name of the few pictures, which identifies their content.
        probes: name -> hash of the chosen rows.
        methods: method of a subject that is not of this package -> its dotted path and the sha256 of its file.
    """

    backbone: str
    prompts: dict[str, str]
    data: dict[str, str]
    checkpoints: dict[str, str]
    pictures: Mapping[str, str] = {}
    methods: Mapping[str, str] = {}
    adaptations: Mapping[str, str] = {}
    probes: Mapping[str, str] = {}


def as_dict(inputs: Inputs) -> dict[str, Any]:
    """Plain values, as they go into the manifest; without adaptations and probes as older versions wrote them."""
    return {name: value for name, value in inputs._asdict().items() if value or name not in ("adaptations", "probes")}


def digest(*values: Any) -> str:
    """Twelve hex digits over JSON-able values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_id(config: Config, subject: Subject, inputs: Inputs) -> str:
    """Id of a subject's aligned weights. The subject's name is no part of it."""
    made: dict[str, Any] = {}
    if subject.checkpoint:
        made["checkpoint"] = inputs.checkpoints[subject.checkpoint]
    else:
        method = methods.find(subject.method)
        made |= {"method": method.name, "source": method.source}
        made["options"] = _options(method, subject, inputs, config.seed)
    return digest(inputs.backbone, config.dtype, made, config.concept, config.seed)


def _options(method: Method, subject: Subject, inputs: Inputs, seed: int) -> dict[str, Any]:
    """The values of all the method's options as the stage align passes them, data sources by their content.

    So an id changes with a default, and does not when the default is named.
    """
    by_content = {option: inputs.pictures[place] for option, place in sources(subject).items()}
    return _values(methods.defaults(method), {"seed": seed} | subject.options | by_content)


def _values(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options that determine a result: those given, else their defaults."""
    values = {**defaults, **given}
    values.pop("progress", None)  # changes no result
    return {name: _as_default(value, defaults.get(name)) for name, value in values.items()}


def _as_default(value: Any, default: Any) -> Any:
    """The default if the value is an equal number (1 for 1.0), else the value."""
    return default if isinstance(value, int | float) and value == default else value


def data_sources(subjects: Iterable[Subject]) -> dict[str, str]:
    """The data sources in the subjects' options, each with the hash of its content. Raises as `pictures.identity`."""
    # By place, so that a source which several subjects name is read once.
    named = {place: f"{s.name}: {option}" for s in subjects for option, place in sources(s).items()}
    return {place: pictures.identity(place, name) for place, name in named.items()}


def sources(subject: Subject) -> dict[str, str]:
    """option -> data source, for the data options of a subject's method that are set."""
    if subject.checkpoint:
        return {}
    method = methods.find(subject.method)
    values = methods.defaults(method) | subject.options
    return {option: values[option] for option in method.data_options if values.get(option)}


def method_sources(subjects: Iterable[Subject]) -> dict[str, str]:
    """Methods of the subjects that are not of this package, each with its dotted path and the sha256 of its file."""
    found = {s.method: methods.find(s.method).source for s in subjects if not s.checkpoint}
    return {name: source for name, source in found.items() if source}


def images_id(config: Config, weights: str, inputs: Inputs) -> str:
    """Id of the images that the weights with this id make before fine-tuning."""
    sampling = dataclasses.asdict(config.generation)
    sampling.pop("batch_size")
    if not sampling["max_sequence_length"]:  # the backbone's own, so that ids of older runs stay
        sampling.pop("max_sequence_length")
    return digest(weights, inputs.prompts, config.prompts.images, config.prompts.own_guidance, sampling)


def cell_id(config: Config, subject_id: str, data: str, profile: str, scenario: str, seed: int) -> str:
    """Id of one fine-tuning of a subject and of its results.

    data: the name of the scenario's data set, or what the profile reads in its place (`Inputs.adaptations`).
    """
    if protocols.adapter_of(profile):
        return digest(subject_id, ("adapter", data, profile, scenario, seed))
    bft = dataclasses.asdict(config.bft)
    shared = {name: value for name, value in bft.items() if name not in NOT_HASHED}
    if not shared["joint_text"]:  # as all runs before there was the option
        shared.pop("joint_text")
    if profile in protocols.OWN_PROFILES:
        return digest(subject_id, (shared, data, _own(config, profile), profile, scenario, seed))
    tuning = (shared, data, bft["steps"][profile], bft["epochs"][profile], profile, scenario, seed)
    return digest(subject_id, tuning)


def attack_id(config: Config, settings: Attack, model: str) -> str:
    """Id of one attack on one model, and of what comes of it. model: the id of a subject, a cell, or `unaligned_id`."""
    attack = attacks.find(settings.attack)
    how: dict[str, Any] = {"attack": attack.name, "options": _values(attacks.defaults(attack), settings.options)}
    how |= {"transfer": settings.transfer, "prompts": settings.prompts}
    return digest(model, settings.name, how, config.concept, config.seed)


def probe_id(probe: Probe, inputs: Inputs, model: str) -> str:
    """Id of one probe of one model. model: the id of a subject or a cell."""
    return digest(model, "probe", probe.name, probe.role, inputs.probes[probe.name])


def unaligned_id(config: Config, inputs: Inputs) -> str:
    """Id of the unaligned model and the harmful prompts, which determine what a transferred attack is made from."""
    return digest(inputs.backbone, config.dtype, inputs.prompts["harmful"])


def _own(config: Config, profile: str) -> dict[str, Any]:
    """The settings of `bft.own` that decide what a profile of ours makes. The pictures count by their content."""
    own = config.bft.own
    names: dict[str, tuple[str, ...]] = {"textual_inversion": ("word", "initial")}
    names["dreambooth"] = ("instance", "kind", "class_pictures", "prior_weight")
    values: dict[str, Any] = {name: getattr(own, name) for name in names.get(profile, ())}
    lengths: dict[str, Any] = {"steps": own.steps, "epochs": own.epochs, "lr": own.lr}
    return values | {name: getattr(numbers, profile, None) for name, numbers in lengths.items()}
