"""Whether a config can work, found out before anything is opened."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from spqr_jax import attacks, methods, profiles, protocols, schedulers
from spqr_jax.backbones.models.layers import LORA_INITS
from spqr_jax.config import Config, Subject
from spqr_jax.data import order
from spqr_jax.files.records import ROLES
from spqr_jax.run import bft, names, protocol
from spqr_jax.score import rules as rules_lib

DTYPES = ("float32", "bfloat16")


def check(config: Config) -> None:
    """Raise ValueError naming the first field whose value cannot work, the config's own or its protocol's."""
    config = protocol.resolve(config)
    check_settings(config)
    for subject in config.subjects:
        check_method(subject)


def check_settings(config: Config) -> None:
    """`check` of a resolved config without its subjects' methods, so that no method's package is imported."""
    _check_names(config)
    _check_attacks(config)
    _check_probes(config)
    _check_profiles(config)
    _one_of("bft.stages", config.bft.stages, order.STAGES)
    _one_of("bft.order", config.bft.order, order.ORDERS)
    _one_of("bft.lora_init", config.bft.lora_init, LORA_INITS)
    _one_of("judges.reference_crop", config.judges.reference_crop, names.REFERENCE_CROPS)
    _one_of("generation.scheduler", config.generation.scheduler, schedulers.NAMES)
    _one_of("dtype", config.dtype, DTYPES)
    _one_of("concept", config.concept, names.concepts())
    _check_score(config)
    _check_report(config)
    _check_numbers(config)


def _one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"config.{field}={value!r} is unknown; expected one of {', '.join(allowed)}.")


def _check_names(config: Config) -> None:
    if not config.subjects:
        raise ValueError("config.subjects is empty; name at least one subject.")
    named = [subject.name for subject in config.subjects]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"config.subjects: the name {name!r} is used twice.")


def check_method(subject: Subject) -> None:
    """Raise ValueError for a method that is not known, an option that it does not have, or one that is missing."""
    if subject.checkpoint:
        return
    where = f"subjects[{subject.name}]"
    try:
        method = methods.find(subject.method)
    except ValueError as error:
        raise ValueError(f"config.{where}: {error}") from error
    for option in subject.options:
        _one_of(f"{where}.options", option, methods.options(method))
    values = methods.defaults(method) | {"seed": 0, "progress": True} | subject.options  # the stage sets these two
    for option in methods.options(method):
        if option not in values:
            raise ValueError(f"config.{where}.options: {option!r} of method {method.name} has no default; set it.")
    for option in method.data_options:
        if values[option] and not isinstance(values[option], str):
            raise ValueError(
                f"config.{where}.options[{option!r}]={values[option]!r} is no text; name a data source (docs/data.md)."
            )


def _check_attacks(config: Config) -> None:
    named = [settings.name for settings in config.attacks]
    for settings in config.attacks:
        where = f"attacks[{settings.name}]"
        if not settings.name or named.count(settings.name) > 1:
            raise ValueError(f"config.attacks: the name {settings.name!r} is empty or used twice; each has its own.")
        try:
            defaults = attacks.defaults(attacks.find(settings.attack))
        except ValueError as error:
            raise ValueError(f"config.{where}: {error}") from error
        for option, value in settings.options.items():
            _one_of(f"{where}.options", option, defaults)
            _check_budget(f"{where}.options[{option!r}]", value, defaults[option])
        if not 0 <= settings.prompts <= config.prompts.n_harmful:
            raise ValueError(
                f"config.{where}.prompts={settings.prompts}: expected 1 to {config.prompts.n_harmful} of the "
                "run's harmful prompts, or 0 for all."
            )


def _check_budget(field: str, value: Any, default: Any) -> None:
    """Raise ValueError for an option of another type than its default, and for a budget that would do nothing."""
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    kind = type(default)
    if kind not in kinds:
        return
    least = " of at least 1" if kind is int and default >= 1 else ""
    if type(value) not in kinds[kind] or (least and value < 1):
        raise ValueError(f"config.{field}={value!r}: expected {wanted[kind]}{least}.")


def _check_probes(config: Config) -> None:
    named = [probe.name for probe in config.probes]
    for probe in config.probes:
        if not probe.name or named.count(probe.name) > 1:
            raise ValueError(f"config.probes: the name {probe.name!r} is empty or used twice; each has its own.")
        _one_of(f"probes[{probe.name}].role", probe.role, ROLES)


def _check_profiles(config: Config) -> None:
    """Raise ValueError for a profile that is not known, or that lacks what the config must say about it."""
    own = config.bft.own
    for profile in config.bft.profiles:
        try:
            protocols.check_profile(profile)
            bft.length(config.bft, profile)
        except ValueError as error:
            raise ValueError(f"config.bft.profiles: {error}") from None
    if asked := [profile for profile in config.bft.profiles if profile in profiles.OF_FEW_PICTURES]:
        needed = {"pictures": own.pictures}
        needed |= {"instance": own.instance, "kind": own.kind} if "dreambooth" in asked else {}
        needed |= {"word": own.word, "initial": own.initial} if "textual_inversion" in asked else {}
        if missing := [f"config.bft.own.{name}" for name, value in needed.items() if not value]:
            raise ValueError(f"config.bft.profiles: for {' and '.join(asked)} set {', '.join(missing)}.")
    if "dreambooth" in config.bft.profiles and config.bft.batch_size % 2:
        raise ValueError(f"config.bft.batch_size={config.bft.batch_size} is odd; dreambooth needs two halves.")


def _check_score(config: Config) -> None:
    """Raise ValueError for rules of the score that cannot work, or that name a subject which the config lacks."""
    rules = rules_lib.of_protocol(protocols.find(config.protocol), "")
    rules_lib.check(rules_lib.configured(rules, dataclasses.asdict(config.score)))
    subjects = [subject.name for subject in config.subjects]
    for name in config.score.cohort:
        _one_of("score.cohort", name, subjects)
    ceiling = config.score.ceiling
    try:
        known = 0 < float(ceiling) <= 1
    except ValueError:
        known = ceiling in ("", "none", *subjects)
    if not known:
        raise ValueError(
            f"config.score.ceiling={ceiling!r}: expected a cosine above 0 and at most 1, none, or a subject's name: "
            f"{', '.join(subjects)}."
        )


def _check_report(config: Config) -> None:
    if config.report.tables or config.report.figures:
        from spqr_jax.report import figures, tables  # here, because Matplotlib takes half a second to import

        tables.known(config.report.tables)
        figures.known(config.report.figures)


def _check_numbers(config: Config) -> None:
    at_least = {
        "prompts.n_harmful": (config.prompts.n_harmful, 1),
        "prompts.n_benign": (config.prompts.n_benign, 1),
        "prompts.images": (config.prompts.images, 1),
        "generation.steps": (config.generation.steps, 1),
        "generation.batch_size": (config.generation.batch_size, 0),
        "bft.batch_size": (config.bft.batch_size, 1),
        "bft.samples": (config.bft.samples, max(config.bft.curriculum, default=1)),
        "bft.rank": (config.bft.rank, 1),
        "bft.resolution": (config.bft.resolution, 0),
        "bft.max_bad": (config.bft.max_bad, 0),
        "bft.accumulate": (config.bft.accumulate, 0),
        "bft.checkpoint_every": (config.bft.checkpoint_every, 1),
        "bft.eval_at": (min(config.bft.eval_at, default=0), 0),
        "bft.eval_prompts": (config.bft.eval_prompts, 0),
        "bft.own.n_pictures": (config.bft.own.n_pictures, 1),
        "bft.own.class_pictures": (config.bft.own.class_pictures, 1),
        "bft.own.prior_weight": (config.bft.own.prior_weight, 0),
        **{f"bft.own.steps.{p}": (getattr(config.bft.own.steps, p), 0) for p in protocols.OWN_PROFILES},
        **{f"bft.own.epochs.{name}": (n, 0) for name, n in dataclasses.asdict(config.bft.own.epochs).items()},
        "judges.n_reference": (config.judges.n_reference, 2),
        "mesh.cpu_devices": (config.mesh.cpu_devices, 1),
        "score.replicates": (config.score.replicates, 100),
        "report.prompts": (config.report.prompts, 0),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise ValueError(f"config.{name}={value} is too small; expected at least {least}.")
    if not 0 <= config.judges.max_undecided <= 1:
        raise ValueError(f"config.judges.max_undecided={config.judges.max_undecided} is outside 0..1.")
