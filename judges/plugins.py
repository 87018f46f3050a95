"""Plug-ins: methods, judges and readers of data that an installed distribution offers, or a file of one's own.

A distribution offers them as entry points of a group, as "spqr_jax.methods". A dotted path, as "my_lab.erase", names
anything that can be imported. Nothing is imported before it is named, so a broken plug-in breaks only a run that names
it. The names of built-in things cannot be taken.

The rooms of methods and of data find their plug-ins here too. The module stands in this room because judges may import
no other, and it needs Python alone.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

METHODS, JUDGES, DATA = "spqr_jax.methods", "spqr_jax.judges", "spqr_jax.data"  # the groups


class PluginError(ValueError):
    """A plug-in that cannot be used. The message, one line, names it, its distribution and what is wrong."""


class Plugin(NamedTuple):
    """A plug-in that was imported.

    Attributes:
        module: the module that its name leads to.
        value: the thing itself; None if the module has none of that name.
        place: where it stands, "my_method:METHOD" of an entry point, "my_lab.erase" of a dotted path.
        distribution: name and version of the distribution that offers it; "" for a dotted path.
    """

    module: ModuleType
    value: Any
    place: str
    distribution: str = ""

    def source(self, function: Any = None) -> str:
        """Distribution, version, place, and the sha256 of its files, in words: what results are identified by.

        function: what is called in the end, where that is not `value`. Raises PluginError as `_sha256`.
        """
        whole = bool(self.distribution)  # a distribution's files belong together, those of a folder need not
        digest = _sha256(self.value if function is None else function, self.module, whole)
        return f"{self.distribution} {self.place} sha256:{digest}".strip()


# --- entry points


def offered(group: str) -> dict[str, list[EntryPoint]]:
    """name -> the entry points of this name in a group, in the order of the names. Nothing is imported."""
    return _offered(group, tuple(sys.path))


@functools.lru_cache(maxsize=32)  # a sweep asks for every cell
def _offered(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    del path  # where distributions are looked for
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name):
        found.setdefault(point.name, []).append(point)
    return found


def find(group: str, name: str, where: str) -> Plugin | None:
    """The plug-in of this name in a group, imported; None if no distribution offers one.

    where: the thing in messages, "method 'mine'". Raises PluginError if several distributions offer the name, naming
    them, and if it cannot be imported.
    """
    points = offered(group).get(name, [])
    if len(points) > 1:
        listed = " and ".join(f"{distribution(point)} ({point.value})" for point in points)
        raise PluginError(
            f"{where} is offered by {listed}; uninstall all but one of them, or write the dotted path of the one meant."
        )
    return _loaded(points[0], where) if points else None


def _loaded(point: EntryPoint, where: str) -> Plugin:
    try:
        module = importlib.import_module(point.module)
        value = functools.reduce(getattr, filter(None, (point.attr or "").split(".")), module)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{where}: the entry point {point.name} = {point.value} of {distribution(point)} cannot be loaded "
            f"({in_words(error)}); correct that distribution, or uninstall it."
        ) from error
    return Plugin(module, value, point.value, distribution(point))


def distribution(point: EntryPoint) -> str:
    """Name and version of the distribution that offers an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def refusal(group: str, name: str) -> str:
    """Why the entry points of a built-in thing's name are not used; "" if there are none."""
    points = offered(group).get(name, [])
    listed = " and ".join(f"{distribution(point)} ({point.value})" for point in points)
    return f"{name!r} of {listed} is refused: that is the name of a built-in one, which stays" if points else ""


@functools.lru_cache(maxsize=256)  # once for each name
def warn_if_refused(group: str, name: str) -> None:
    """Log a warning if a distribution offers a thing under the name of a built-in one, which a user may have meant."""
    if reason := refusal(group, name):
        logging.getLogger(__name__).warning("%s: %s.", group, reason)


# --- dotted paths


def is_dotted(name: str) -> bool:
    """Whether a name has the form of a dotted path, "my_lab.erase"."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def imported(path: str, where: str) -> Plugin:
    """What a dotted path names. Raises PluginError if its module cannot be imported."""
    parent, _, name = path.rpartition(".")
    module = _import(where, parent)
    if not hasattr(module, name) and hasattr(module, "__path__") and importlib.util.find_spec(path):
        return Plugin(module, _import(where, path), path)
    return Plugin(module, getattr(module, name, None), path)


def _import(where: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        remedy = "correct that module"
        if missing and f"{module}.".startswith(f"{missing}."):
            remedy = "set PYTHONPATH to the folder that holds it"
        elif missing:
            remedy = f"install {missing}"
        raise PluginError(f"{where} cannot be imported ({in_words(error)}); {remedy}.") from error


def in_words(error: BaseException) -> str:
    """The type and message of an error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- identity


@functools.cache  # the code in memory stays what it is when its file changes
def _sha256(value: Any, module: ModuleType, whole: bool) -> str:
    """Hash of the files that make a thing: that which defines it, and that of the module which it is named in.

    whole: all files of that module's package instead (`_package`). One file gives its own sha256; several give that of
    the lines "SHA256  NAME" in the order of the names. Raises PluginError if there is no file.
    """
    files = _package(module) if whole else {}
    for file in (_source_file(value), getattr(module, "__file__", None)):
        path = Path(file).resolve() if file else None
        if path and path.is_file() and path not in files.values():
            files[path.name if path.name not in files else str(path)] = path
    if not files:
        named = f"{getattr(value, '__module__', module.__name__)}.{getattr(value, '__qualname__', value)}"
        raise PluginError(
            f"{named} is in no file, so that results of another version could not be told from its own; write it in a "
            ".py file."
        )
    hashes = {name: _of_file(files[name]) for name in sorted(files)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source_file(value: Any) -> str:
    """The path of the file that defines a function or class; "" if there is none."""
    file = _source_file(value)
    return str(Path(file).resolve()) if file else ""


def _source_file(value: Any) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(value))
    except TypeError:  # neither a function nor a class
        return None


def _package(module: ModuleType) -> dict[str, Path]:
    """name -> path of every file of a module's outermost package (folders without __init__.py count for none).

    Data files belong to it. Bytecode and hidden files do not. A module outside a package has no such files.
    """
    names = module.__name__.split(".")
    outer = [sys.modules.get(".".join(names[:depth])) for depth in range(1, len(names) + 1)]
    packages = [one for one in outer if one and hasattr(one, "__path__") and getattr(one, "__file__", None)]
    if not packages:
        return {}
    folder = Path(str(packages[0].__file__)).resolve().parent
    files = {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if not _passing(name)}


def _passing(name: str) -> bool:
    return name.endswith(".pyc") or any(part == "__pycache__" or part.startswith(".") for part in name.split("/"))
