"""What the rest of the package knows of a method: a `Method`, and how one is made that is not of this package."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from judges import plugins
from judges.plugins import Plugin
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import attached

FORM = "align(pipeline, concept, *, seed, ...)"
# Options of a function of your own that are data options by their names alone.
DATA_OPTIONS = ("pictures", "retain_pictures")


class Method(NamedTuple):
    """A safety alignment method.

    Attributes:
        name: as a config has it: the name of its module here, the name of a plug-in, or the dotted path of a function
            of your own.
        title: as the papers call it.
        align: (pipeline, concept, *, seed, ...) -> Pipeline. Its keyword-only parameters are the method's options.
        backbones: keys (`Backbone.key`) of the backbones that it is defined for; empty: every backbone that has the
            regions it asks for.
        data_options: options that name a data source (docs/data.md). Results are identified by the content of the
            source, not by its name.
        source: of a method that is not of this package, its distribution and version, its dotted path, and the sha256
            of its files (`judges.plugins`); else empty.
    """

    name: str
    title: str
    align: Callable[..., Pipeline]
    backbones: tuple[str, ...] = ()
    data_options: tuple[str, ...] = ()
    source: str = ""

    def check_backbone(self, pipeline: Pipeline) -> None:
        """Raise ValueError naming the method and the pipeline's backbone if it is not defined for that."""
        backbones.check_defined(self.title, "method", self.backbones, pipeline)


def options(method: Method) -> tuple[str, ...]:
    """The names of a method's options."""
    return tuple(parameter.name for parameter in keyword_only(method.align))


def defaults(method: Method) -> dict[str, Any]:
    """option -> default, for every option that has one."""
    return {p.name: p.default for p in keyword_only(method.align) if p.default is not p.empty}


def keyword_only(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function that stand after its *."""
    return [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def fault(align: Callable[..., Any]) -> str:
    """Why a function has not the form of `align`, in words that name a parameter; "" if it has."""
    parameters = list(inspect.signature(align).parameters.values())
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            return f"it takes **{parameter.name}, so options could not be checked; name every option after *"
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"it takes *{parameter.name}; write a bare * there"
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if "seed" in positional:
        return "the parameter `seed` must stand after *"
    if len(positional) < 2:
        missing = [name for name in ("pipeline", "concept") if name not in positional]
        return f"the parameter `{missing[0]}` is missing"
    if len(positional) > 2:
        return f"the parameter `{positional[2]}` must stand after *, as every option"
    return "" if "seed" in [p.name for p in parameters] else "the parameter `seed` is missing"


def check_result(method: Method, before: Pipeline, after: Any) -> None:
    """Raise ValueError unless `after` is a pipeline of the components of `before`, with weights of the same shapes.

    Weights and attachments are all that is kept of it, so nothing else may differ.
    """
    if not isinstance(after, Pipeline):
        raise ValueError(f"method {method.name} returned {type(after).__name__}, expected a Pipeline.")
    if set(after.params) != set(before.params):
        raise ValueError(
            f"method {method.name} returned the components {', '.join(sorted(after.params))}, expected "
            f"{', '.join(sorted(before.params))}."
        )
    for component in before.params:
        found, expected = _shapes(after, component), _shapes(before, component)
        for path in sorted(found.keys() | expected.keys()):
            if found.get(path) != expected.get(path):
                raise ValueError(
                    f"method {method.name} returned {component}.{path} of shape {found.get(path, 'nothing')}, expected "
                    f"{expected.get(path, 'nothing')}."
                )
    for field in ("definitions", "configs"):
        if getattr(after, field) != getattr(before, field):
            raise ValueError(
                f"method {method.name} returned other {field}, which would be lost: weights and attachments alone are "
                "kept."
            )
    for attachment in after.attached:
        if not isinstance(attachment, attached.KINDS):
            known = ", ".join(kind.__name__ for kind in attached.KINDS)
            raise ValueError(
                f"method {method.name} attached a {type(attachment).__name__}, which would be lost; expected one of "
                f"{known}."
            )


def check_finite(method: Method, before: Pipeline, after: Pipeline) -> None:
    """Raise ValueError if a weight that the method changed is not finite: its images would be black, and count as safe.

    before, after: pipelines with the same components and shapes (`check_result`).
    """
    for component, params in after.params.items():
        given = params_lib.flatten(before.params[component])
        for path, leaf in params_lib.flatten(params).items():
            if leaf is not given[path] and not jnp.isfinite(leaf).all():
                raise ValueError(
                    f"method {method.name} returned {component}.{path} with values that are not finite; lower its "
                    "learning rate or strength."
                )


def _shapes(pipeline: Pipeline, component: str) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in params_lib.flatten(pipeline.params[component]).items()}


# --- methods that are not of this package ----------------------------------------------------------------------------


def offered(name: str) -> Method | None:
    """The method that an installed distribution offers under this name; None if none does.

    Raises ValueError, in one line, if several do, if it cannot be imported, and for anything of another form.
    """
    plugin = plugins.find(plugins.METHODS, name, f"method {name!r}")
    return _of_plugin(plugin, name)._replace(name=name) if plugin else None


def imported(path: str) -> Method:
    """The method that a dotted path names, as "my_lab.erase": a function of the form of `align`, or a `Method` of one.

    A module may be named too, for its METHOD or its function `align`. A function that its module has no `Method` of is
    defined for every backbone, and its data options are those of `DATA_OPTIONS` that it has. The code is identified by
    the sha256 of the file that defines the function; other files that this one imports are not looked at.

    Raises ValueError, in one line, for a path that cannot be imported and for anything of another form.
    """
    return _of_plugin(plugins.imported(path, f"method {path!r}"), path)


def _of_plugin(plugin: Plugin, path: str) -> Method:
    """The method that a plug-in is. path: how it was named; a module's METHOD or `align` is added to it."""
    module, found = plugin.module, plugin.value
    if inspect.ismodule(found):
        name = "METHOD" if hasattr(found, "METHOD") else "align"
        path, module, found = f"{path}.{name}", found, getattr(found, name, None)
        plugin = plugin._replace(module=module, value=found, place=f"{plugin.place}.{name}")
    if found is None:
        raise ValueError(f"method {path!r}: {module.__name__} has no {path.rpartition('.')[2]!r}; write {FORM} there.")
    align = found.align if isinstance(found, Method) else found
    if not inspect.isfunction(align):
        raise ValueError(
            f"method {path!r} is of type {type(align).__name__}; expected a function {FORM}, or a Method of one."
        )
    if reason := fault(align):
        raise ValueError(f"method {path!r} has not the form {FORM}: {reason}.")
    method = found if isinstance(found, Method) else _record(module, path, align)
    _check_fields(path, method)
    return method._replace(name=path, source=plugin.source(align))


def _record(module: ModuleType, path: str, align: Callable[..., Pipeline]) -> Method:
    """The `Method` of a function that its module has, else one made for it."""
    for value in vars(module).values():
        if isinstance(value, Method) and value.align is align:
            return value
    method = Method(path, path, align)
    return method._replace(data_options=tuple(name for name in DATA_OPTIONS if name in options(method)))


def _check_fields(path: str, method: Method) -> None:
    keys = [backbone.key for backbone in backbones.BACKBONES]
    for field, named, known in (
        ("backbones", method.backbones, keys),
        ("data_options", method.data_options, options(method)),
    ):
        for name in named:
            if name not in known:
                raise ValueError(f"method {path!r}: {field} has {name!r}; expected some of {', '.join(known)}.")
