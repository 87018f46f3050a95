"""A config and its protocol: open fields filled in, and the fields in which the config departs from the protocol."""

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

from spqr_jax import protocols
from spqr_jax.config import Config
from spqr_jax.protocols import PROFILES, PromptSet, Protocol, Statement

# Fields that every protocol leaves at the config's default. Setting one departs from the protocol.
LEFT_ALONE = (
    *("prompts.images", "bft.warmup_share", "bft.snr_gamma", "bft.noise_offset", "bft.ema"),
    *("score.fid_min", "score.fid_max", "score.cohort", "score.ceiling"),
)


def resolve(config: Config) -> Config:
    """The config with every open field (`AS_PROTOCOL`) filled in. Resolving twice changes nothing.

    Raises ValueError for an unknown protocol.
    """
    protocol, config = protocols.find(config.protocol), copy.deepcopy(config)
    kind = kind_of(config.prompts.harmful)
    taken = protocol.prompts.sets.get(kind, PromptSet("", protocol.prompts.n_harmful))
    config.prompts.harmful = _with(config.prompts.harmful, f"?{taken.selection}" if taken.selection else "")
    if config.prompts.n_harmful is None:
        config.prompts.n_harmful = taken.n
    for section, values in _plain_fields(protocol).items():
        for name, value in values.items():
            if getattr(getattr(config, section), name) is None:
                setattr(getattr(config, section), name, value)
    for profile in PROFILES:
        if getattr(config.bft.epochs, profile) is None:
            setattr(config.bft.epochs, profile, getattr(protocol.bft.epochs, profile))
    variants = protocol.judges.variants
    config.judges.safety = {
        name: _with(source, variants.get(kind_of(source), "")) for name, source in config.judges.safety.items()
    }
    if not config.judges.features.startswith("mini:"):
        config.judges.features = _with(config.judges.features, protocol.judges.features)
    return config


def changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which a resolved config departs from its protocol -> (the config's value, the protocol's)."""
    protocol, default = protocols.find(config.protocol), Config()
    expected: dict[str, Any] = {"seed": protocol.seed, "concept": protocol.concept, "dtype": protocol.dtype}
    for section, values in _plain_fields(protocol).items():
        expected |= {f"{section}.{name}": value for name, value in values.items()}
    expected |= {f"bft.epochs.{profile}": getattr(protocol.bft.epochs, profile) for profile in PROFILES}
    expected |= {f"bft.steps.{profile}": 0 for profile in PROFILES}
    expected |= {field: value_of(default, field) for field in LEFT_ALONE}
    expected |= _expected_sets(config, protocol)
    if own := [profile for profile in config.bft.profiles if profile not in PROFILES]:
        expected["bft.profiles"] = [profile for profile in config.bft.profiles if profile not in own]
    found = {field: value_of(config, field) for field in expected}
    return {
        field: (found[field], value)
        for field, value in expected.items()
        if _comparable(found[field]) != _comparable(value)
    }


def _expected_sets(config: Config, protocol: Protocol) -> dict[str, Any]:
    """What the protocol says about the harmful prompts, the safety judges and the feature network of a config.

    Paths differ from machine to machine, so the kind and what follows the path are compared.
    """
    kind, source = kind_of(config.prompts.harmful), config.prompts.harmful
    taken = protocol.prompts.sets.get(kind)
    known = taken is not None and source.partition("?")[2] == taken.selection
    named = " or ".join(f"{name}:FILE?{s.selection}".rstrip("?") for name, s in protocol.prompts.sets.items())
    expected: dict[str, Any] = {"prompts.harmful": source if known else named}
    expected["prompts.n_harmful"] = taken.n if taken else protocol.prompts.n_harmful
    variants, safety = protocol.judges.variants, config.judges.safety
    kinds = sorted(kind_of(place) for place in safety.values())
    same = kinds == sorted(variants) and all(place.endswith(variants[kind_of(place)]) for place in safety.values())
    expected["judges.safety"] = safety if same else {name: _with(name, variant) for name, variant in variants.items()}
    network = config.judges.features
    expected["judges.features"] = network if network.endswith(protocol.judges.features) else protocol.judges.features
    return expected


def _plain_fields(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """section of a config -> its fields that the protocol gives as they are."""
    prompting, judging, scoring = protocol.prompts, protocol.judges, protocol.score
    return {
        "prompts": {"n_benign": prompting.n_benign, "own_guidance": prompting.own_guidance},
        "generation": protocol.generation._asdict(),
        "bft": {name: value for name, value in protocol.bft._asdict().items() if name != "epochs"},
        "judges": {name: getattr(judging, name) for name in ("rule", "n_reference", "reference_crop")},
        "score": {name: getattr(scoring, name) for name in ("eps", "headline", "weights")},
    }


def kind_of(source: str) -> str:
    """The word before the colon of a prompt set, or that a judge's source begins with: "visu", "nudenet"."""
    word = re.match(r"[a-z][a-z0-9_]+(?=[:?]|$)", source)
    return word[0] if word else ""


def _with(source: str, variant: str) -> str:
    """A source with the protocol's variant or options, unless it names its own."""
    if not variant or "?" in source:
        return source
    if variant.startswith("?"):
        return source + variant
    return source if ":" in source else f"{source}:{variant}"


def value_of(config: Config, field: str) -> Any:
    """The value of a dotted field: value_of(config, "bft.epochs.lite")."""
    return functools.reduce(getattr, field.split("."), config)


def _comparable(value: Any) -> Any:
    """Equal for values that mean the same: lists and tuples, 1 and 1.0."""
    return tuple(value) if isinstance(value, list | tuple) else value


def statement(config: Config) -> Statement:
    """The statement of a resolved config."""
    changed = {field: [_as_json(ours), _as_json(theirs)] for field, (ours, theirs) in changes(config).items()}
    return Statement(config.protocol, changed)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, list | tuple) else value
