"""The count of FLOP in a traced program: matrix products and convolutions, in all turns of its loops.

Compilers count for some targets only, a loop once, and no operation inside a kernel of their own. This count is of the
mathematics as traced, so it is the same for every target that is traced in the same way.
"""

import math
from collections.abc import Iterator
from typing import Any


def flop(jaxpr: Any) -> float:
    """FLOP of the matrix products and convolutions of a traced program, all turns of its loops, over all devices.

    Two for a multiplication and an addition. Of branches the most expensive one counts. A loop whose number of turns is
    not known in advance counts once; the programs here have none.
    """
    return sum(_flop_of(equation) for equation in jaxpr.eqns)


def _flop_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        inputs = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * inputs
    inner = [sub for value in params.values() for sub in _jaxprs(value)]
    if not inner:
        return 0.0
    if name == "cond":
        return max(flop(sub) for sub in inner)
    turns = params["length"] if name == "scan" else math.prod(_grid(params)) if name == "pallas_call" else 1
    return turns * sum(flop(sub) for sub in inner)


def _grid(params: dict[str, Any]) -> tuple[int, ...]:
    return tuple(size for size in params["grid_mapping"].grid if isinstance(size, int))


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs in a parameter of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
