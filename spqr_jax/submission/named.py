"""Whether settings, weights, data and judges of a manifest are what its config names, as far as this package knows.

A path says nothing about what lay there. But the emoji world ships with this package, built-in judges have options, and
no run begins with settings that cannot work.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from judges import opening, recorded
from judges.session import JudgeError, provider_names
from spqr_jax import methods
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.run import check, jury, names
from spqr_jax.submission.places import shown

KINDS = {"clip_score": "clip_score", "features": "inception"}  # field of a judge of quality -> kind in its identity


def settings_faults(config: Config) -> Iterator[str]:
    """The first setting that no run begins with. Methods of other packages are not imported."""
    try:
        check.check_settings(config)
        for subject in config.subjects:
            if subject.method in methods.METHODS:
                check.check_method(subject)
    except ValueError as error:
        yield shown(str(error))


def shipped_faults(manifest: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Weights and data that are not the emoji world's, where the config names these.

    The run must be one of this version: another one may ship other files.
    """
    sha256 = manifest["sha256"]
    for source, found in {**sha256["checkpoints"], config.base: sha256["backbone"]}.items():
        if names.is_shipped(source) and found != _sha256_of_weights(source):
            yield f"sha256 of the weights {shown(source)} is {shown(found[:12])}, this package ships others"
    for scenario in config.bft.scenarios:
        if names.is_shipped(names.data_source(config, scenario)):
            expected, found = _data(config, scenario), sha256["data"][scenario]
            if found != expected:
                yield f"sha256.data.{shown(scenario)} is {shown(found)}, expected {shown(expected)}"


@functools.lru_cache(maxsize=8)
def _sha256_of_weights(source: str) -> str:
    try:
        return storage.sha256(names.weights_path(source))
    except OSError as error:
        return str(error)


def _data(config: Config, scenario: str) -> str:
    try:
        return names.shipped_dataset(config, scenario)
    except ValueError as error:
        return str(error)


def judges_faults(manifest: Mapping[str, Any], config: Config, *, shipped: bool) -> Iterator[str]:
    """Judges that are not those that the config names, or that ran elsewhere than it says.

    Known are the emoji world's (shipped: whether this version made the run), and of others the kinds and options. Of
    judges of other packages, and of those that a path alone names, nothing is known.
    """
    provider = provider_names(config.judges.providers)[0]
    sources = config.judges.safety | {name: getattr(config.judges, name) for name in jury.QUALITY}
    for name, source in sources.items():
        quality, identity = name if name in jury.QUALITY else "", manifest["judges"][name]
        fault = _judge_fault(quality, source, identity)
        if not fault and shipped and names.is_shipped(source):
            expected = _shipped_judge(quality, source)
            if isinstance(expected, str):
                fault = shown(expected)
            elif recorded.without_provider(identity) != expected:
                fault = f"it is not the judge that {shown(source)} is in this package"
        if not fault and "plugin" not in identity and (other := recorded.providers(identity) - {provider}):
            fault = f"it ran on {shown(str(sorted(other)))}, the config says {provider}"
        if fault:
            yield f"judges.{shown(name)}: {fault}"


def _judge_fault(quality: str, source: str, identity: Mapping[str, Any]) -> str:
    """What an identity has otherwise than its source says. quality: the field of a judge of quality, else ""."""
    kind = "" if quality else opening.kind_of(source)
    opener = jury.QUALITY[quality] if quality else opening.JUDGES.get(kind)
    if opener is None:
        return ""
    if identity.get("judge") != KINDS.get(quality, kind):
        return f"it is of kind {shown(repr(identity.get('judge')))}, the config names {shown(repr(source))}"
    try:
        asked = opening.options_of(opener, source.removeprefix(kind).removeprefix(":"))
    except (JudgeError, ValueError, OSError) as error:
        return shown(str(error))
    stated = identity.get("options") or {}
    for option, value in asked.items():
        if option in stated and stated[option] != value:
            return f"{option} is {shown(repr(stated[option]))}, the config says {shown(repr(value))}"
    return ""


@functools.lru_cache(maxsize=32)
def _shipped_judge(quality: str, source: str) -> Any:
    """The identity of a judge of the emoji world, or why there is none."""
    try:
        located = jury.located(source)
        opened = opening.open_at(jury.QUALITY[quality], located) if quality else opening.open_safety(located)
    except (JudgeError, ValueError, OSError) as error:
        return str(error)
    return recorded.without_provider(opened.identity)
