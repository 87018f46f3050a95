"""The checks: what every method keeps to, one `Finding` each."""

import ast
import copy
import inspect
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from judges import plugins
from spqr_jax import backbones, methods
from spqr_jax import params as params_lib
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import FORM, Method, check_finite, check_result, defaults, fault, options
from spqr_jax.methods.contract import smallest, tiny
from spqr_jax.pipeline import Pipeline

# One text to erase, in words that the tiny pipeline's tokenizer knows.
CONCEPT = Concept("gun", ("gun",), preserve=("cat",), retain=("cat", "dog"), templates=("a {}",))
SEED, OTHER_SEED = 3, 4
UNKNOWN = "no_such_option"
SAYS_NO_SEED = re.compile(
    r"\bdeterministic\b|\bseed\b[^.]{0,80}\b(?:not\s+used|unused|ignored|no\s+effect)\b", re.IGNORECASE
)


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: what a method has to keep to, in words.
        backbone: key of the backbone on which it was tried; "" for a check that needs none.
        fault: what is wrong; "" if it is kept.
        note: what was seen, if it is kept.
    """

    check: str
    backbone: str
    fault: str
    note: str = ""


def line(finding: Finding) -> str:
    """A finding to print."""
    told = f": {finding.fault}" if finding.fault else f" ({finding.note})" if finding.note else ""
    return f"{'FAIL' if finding.fault else 'ok':5}{finding.backbone:6}{finding.check}{told}"


def check(
    method: Method,
    keys: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    *,
    make: Callable[[str], Pipeline] = tiny.pipeline,
) -> Iterator[Finding]:
    """Check a method: its form, then its result for every backbone, each when it is asked for.

    keys: of backbones; default all that have a tiny pipeline, on one of which at least it must run. given: options that
    are not to be the smallest ones. make: key of a backbone -> the pipeline on which the method is tried.
    """
    yield from of_form(method)
    if fault(method.align):
        return
    chosen, ran = keys or list(tiny.COMPONENTS), False
    for key in chosen:
        for finding in of_backbone(method, make(key), given):
            ran |= finding.check == RUNS and not finding.fault
            yield finding
    if not keys and not ran:
        yield Finding("it runs on a backbone at least", "", f"it ran on none of {', '.join(chosen)}")


# --- what needs no model


def of_form(method: Method) -> list[Finding]:
    """The checks that need no model."""
    known, without = options(method), [name for name in options(method) if name not in defaults(method)]
    left = [name for name in without if name not in ("seed", "progress")]
    return [
        Finding(f"it has the form {FORM}", "", fault(method.align)),
        Finding("every option has a default", "", f"none: {', '.join(left)}" if left else "", ", ".join(known)),
        Finding("every option is named in a docstring", "", _listed(undocumented(method))),
    ]


def undocumented(method: Method) -> list[str]:
    """Options that no docstring names: of the method's file, or of `spqr_jax.methods` for those that methods share."""
    text = f"{methods.__doc__}\n{docstrings(method)}"
    return [option for option in options(method) if not re.search(rf"\b{option}\b", text)]


def docstrings(method: Method) -> str:
    """The docstrings of the file that defines a method: the module's, and those of its functions and classes."""
    align = inspect.unwrap(method.align)
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(align) or align))
    except (OSError, TypeError, SyntaxError):  # written where no source is kept
        return align.__doc__ or ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return "\n".join(filter(None, [ast.get_docstring(tree), *map(ast.get_docstring, nodes)]))


def _listed(names: Sequence[str]) -> str:
    return f"not named: {', '.join(names)}" if names else ""


# --- what needs a model


class Tried(NamedTuple):
    """A method tried on one pipeline.

    Attributes:
        given: the pipeline that the first call got, as it is after that call.
        base: a copy of it from before.
        first, again: the results of two calls with the same seed; other: that with another seed.
    """

    given: Pipeline
    base: Pipeline
    first: Pipeline
    again: Pipeline
    other: Pipeline


RUNS = "it runs"
REFUSES = "it refuses a backbone that it does not name"


def of_backbone(method: Method, base: Pipeline, given: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """The checks on one pipeline. given: options that are not to be the smallest ones."""
    backbone = backbones.of(base)
    key, start, chosen = backbone.key, time.monotonic(), smallest.options(method, given)
    if method.backbones and key not in method.backbones:
        yield _refusal(method, base, chosen)
        return
    told = ", ".join(f"{name}={value!r}" for name, value in chosen.items()) or "default options"
    try:
        tried = _tried(method, base, chosen)
    except Exception as error:
        if isinstance(error, ValueError) and backbone.name in str(error):
            yield Finding("it says which backbone it cannot work on", key, "", str(error))
        else:
            yield Finding(RUNS, key, f"{_raised(method, error)}, with {told}")
        return
    yield Finding(RUNS, key, "", f"{told}; {time.monotonic() - start:.1f} s")
    wrong = _result(method, tried)
    yield Finding("it returns the components and shapes that it got", key, wrong)
    if not wrong:
        yield from (Finding(what, key, *found(method, tried)) for what, found in CHECKS.items())
    yield Finding("it refuses an unknown option", key, _takes_unknown(method, base, chosen))


def _tried(method: Method, base: Pipeline, chosen: Mapping[str, Any]) -> Tried:
    given = _copy(base)
    calls = ((given, SEED), (_copy(base), SEED), (_copy(base), OTHER_SEED))
    results = [method.align(pipeline, CONCEPT, **{"seed": seed, **chosen}) for pipeline, seed in calls]
    return Tried(given, base, *results)


def _copy(pipeline: Pipeline) -> Pipeline:
    return pipeline._replace(params=jax.tree.map(np.array, pipeline.params), configs=copy.deepcopy(pipeline.configs))


def _refusal(method: Method, base: Pipeline, chosen: Mapping[str, Any]) -> Finding:
    """Whether the function itself raises ValueError for a backbone that its record leaves out."""
    backbone = backbones.of(base)
    remedy = "call METHOD.check_backbone(pipeline) first"
    try:
        method.align(_copy(base), CONCEPT, **{"seed": SEED, **chosen})
    except ValueError as error:
        named = backbone.name in str(error)
        wrong = "" if named else f"its ValueError does not name {backbone.name} ({error}); {remedy}"
        return Finding(REFUSES, backbone.key, wrong, str(error))
    except Exception as error:
        return Finding(REFUSES, backbone.key, f"{_raised(method, error)}; {remedy}")
    return Finding(REFUSES, backbone.key, f"it aligned {backbone.name}, which its record does not name; {remedy}")


def _takes_unknown(method: Method, base: Pipeline, chosen: Mapping[str, Any]) -> str:
    try:
        method.align(_copy(base), CONCEPT, **{"seed": SEED, **chosen, UNKNOWN: 1})
    except (TypeError, ValueError) as error:
        return "" if UNKNOWN in str(error) else _raised(method, error)
    return f"it took the option {UNKNOWN}; name every option after *"


def _raised(method: Method, error: Exception) -> str:
    """An error in one line, with the last place in the method's own file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = inspect.getsourcefile(inspect.unwrap(method.align))
    frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{plugins.in_words(error)} ({frame.filename}:{frame.lineno})"


def _result(method: Method, tried: Tried) -> str:
    try:
        for result in (tried.first, tried.again, tried.other):
            check_result(method, tried.base, result)
    except ValueError as error:
        return str(error)
    return ""


# --- the checks of a result: (fault, note) each


def _same_dtypes(method: Method, tried: Tried) -> tuple[str, str]:
    after, before = (params_lib.flatten(pipeline.params) for pipeline in (tried.first, tried.base))
    changed = [path for path, leaf in before.items() if after[path].dtype != leaf.dtype]
    return _some([f"{path} is {after[path].dtype}, it was {before[path].dtype}" for path in changed]), ""


def _finite(method: Method, tried: Tried) -> tuple[str, str]:
    try:
        check_finite(method, tried.base, tried.first)
    except ValueError as error:
        return str(error), ""
    return "", ""


def _untouched(method: Method, tried: Tried) -> tuple[str, str]:
    changed = _differing(tried.base.params, tried.given.params)
    changed += ["configs"] if tried.given.configs != tried.base.configs else []
    return _some([f"{path} of the given pipeline has changed" for path in changed]), ""


def _same_seed(method: Method, tried: Tried) -> tuple[str, str]:
    if same(content(tried.first), content(tried.again)):
        return "", ""
    return _some([f"{path} differs" for path in _differing(tried.first.params, tried.again.params)] or ["attached"]), ""


def _does_something(method: Method, tried: Tried) -> tuple[str, str]:
    weights, changed = params_lib.flatten(tried.base.params), _differing(tried.base.params, tried.first.params)
    parts = []
    for component in tried.base.params:
        count = sum(path.startswith(f"{component}.") for path in changed)
        if count:
            parts.append(f"{count} of {sum(path.startswith(f'{component}.') for path in weights)} in {component}")
    parts += [f"attached {type(one).__name__}" for one in tried.first.attached]
    if parts or method.name == "none":
        return "", ", ".join(parts) or "nothing, as it should"
    return "no weight has changed and nothing is attached", ""


def _seed_matters(method: Method, tried: Tried) -> tuple[str, str]:
    if not same(content(tried.first), content(tried.other)):
        return "", "another seed gives another result"
    if SAYS_NO_SEED.search(docstrings(method)):
        return "", "it does not, as a docstring says"
    return "another seed gives the same; use it, or write in a docstring: `seed` is not used", ""


CHECKS: dict[str, Callable[[Method, Tried], tuple[str, str]]] = {
    "it keeps the dtypes": _same_dtypes,
    "its weights are finite": _finite,
    "it leaves the pipeline that it got as it is": _untouched,
    "the same seed gives the same weights": _same_seed,
    "it changes something": _does_something,
    "the seed matters, or a docstring says that it does not": _seed_matters,
}


def content(pipeline: Pipeline) -> Any:
    """Everything of a pipeline that a method may change, as a tree."""
    return pipeline.params, [vars(attachment) for attachment in pipeline.attached]


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same leaves, bit by bit."""
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))


def _differing(a: Any, b: Any) -> list[str]:
    """Paths of the leaves that differ, or that only one of two trees of weights has."""
    one, other = params_lib.flatten(a), params_lib.flatten(b)
    return [p for p in one | other if p not in one or p not in other or not np.array_equal(one[p], other[p])]


def _some(faults: Sequence[str]) -> str:
    """The first faults, and how many there are."""
    return "; ".join(faults[:2]) + (f"; and {len(faults) - 2} more" if len(faults) > 2 else "")
