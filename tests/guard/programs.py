"""What compiled programs compute, as hashes that do not depend on how anything in them is called or ordered.

The input is StableHLO as JAX dumps it (JAX_DUMP_IR_TO). Two hashes a program, both over operations with their
attributes and types; calls are followed, so that a function more or less makes no difference:

- operations: all of them, sorted. Says nothing about which result goes where.
- wiring: the program's results, each a hash of the operation that makes it and of the hashes of its operands, down to
  the arguments, which are known by their types alone. Carried values of a loop may come in any order, and so may the
  operands of an addition.

Neither sees names of functions, arguments, modules and meshes, locations, the order of arguments and results, and
what is said of them (donation, how they are split over devices). Two arguments of one type that change places in the
whole program are not seen either; the run's results tell.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.interpreters import mlir
from jaxlib.mlir import ir

SMALLEST = 300  # operations; smaller programs are helpers, and the run's results tell of them
NAMES = ("sym_name", "sym_visibility", "callee", "function_type", "arg_attrs", "res_attrs")
COMMUTATIVE = ("add", "multiply", "maximum", "minimum", "and", "or", "xor")
SYMBOL = re.compile(r'@("[^"]*"|[\w.$-]+)')


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """Every program of at least SMALLEST operations in a directory of dumps: key -> what is known of it.

    `compiled` counts how often the run compiled it.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in sorted(Counter(path.read_text() for path in directory.glob("*_compile.mlir")).items()):
        program = describe(text[0])
        if program["operations"] >= SMALLEST:
            key = digest(program["sorted"], program["wiring"])
            found.setdefault(key, program | {"compiled": 0})["compiled"] += text[1]
    return dict(sorted(found.items()))


def describe(text: str) -> dict[str, Any]:
    """The hashes of one program, its number of operations and results, and a guess of what it is."""
    with mlir.make_ir_context():
        walk = _Walk(ir.Module.parse(text))
        results = walk.main()
        lines = walk.lines
    names = Counter[str]()
    for (name, *_), count in lines.items():
        names[name] += count
    return {
        "kind": _kind(names, walk.result_types),
        "operations": lines.total(),
        "results": len(results),
        "sorted": digest(sorted(lines.items())),
        "wiring": digest(sorted(results)),
    }


def _kind(names: Counter[str], result_types: list[str]) -> str:
    if names["stablehlo.while"] and any(kind.endswith("ui8>") for kind in result_types):
        return "sampler"
    return "training step" if len(result_types) > 20 else "network"


class _Walk:
    """Goes through a module once from its main function, collecting lines and hashing results."""

    def __init__(self, module: ir.Module):
        self.module = module  # what is taken from it lives as long as it does
        self.lines: Counter[tuple[str, ...]] = Counter()
        self.functions: dict[str, Any] = {}
        for op in module.body.operations:
            if op.operation.name == "func.func":
                self.functions[ir.StringAttr(op.attributes["sym_name"]).value] = op
            else:  # a mesh
                self._note(op.operation)
        self.result_types: list[str] = []

    def main(self) -> list[str]:
        block = self.functions["main"].regions[0].blocks[0]
        self.result_types = [str(value.type) for value in list(block.operations)[-1].operands]
        return self._block(block, [digest("argument", str(a.type)) for a in block.arguments], {})

    def _block(self, block: Any, arguments: list[str], outside: dict[Any, str]) -> list[str]:
        """Hashes of what a block returns. outside: hashes of the values around it, which it may use."""
        known = dict(outside)
        known.update(zip(block.arguments, arguments, strict=True))
        *body, last = [op.operation for op in block.operations]
        for op in body:
            known.update(zip(op.results, self._operation(op, known), strict=True))
        return [known[value] for value in last.operands]

    def _operation(self, op: Any, known: dict[Any, str]) -> list[str]:
        operands = [known[value] for value in op.operands]
        if op.name == "func.call":
            block = self.functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value].regions[0].blocks[0]
            return self._block(block, operands, {})
        line = self._note(op)
        if op.name == "stablehlo.while":
            condition, body = (region.blocks[0] for region in op.regions)
            carried = [digest("carried", operand) for operand in operands]
            turned = self._block(body, carried, known)
            pairs = list(zip(operands, turned, strict=True))
            whole = digest("while", self._block(condition, carried, known), sorted(pairs))
            return [digest(whole, pair) for pair in pairs]
        if op.name == "stablehlo.optimization_barrier":
            return [digest("barrier", operand, sorted(operands)) for operand in operands]
        if op.name.removeprefix("stablehlo.") in COMMUTATIVE:
            operands.sort()
        inside = []
        for region in op.regions:
            for block in region.blocks:
                arguments = [digest("inner", i, str(a.type)) for i, a in enumerate(block.arguments)]
                inside.append(self._block(block, arguments, known))
        whole = digest(line, operands, inside)
        return [digest(whole, i) for i in range(len(op.results))]

    def _note(self, op: Any) -> tuple[str, ...]:
        """Count an operation's line: its name, attributes and types."""
        types = (" ".join(sorted(str(value.type) for value in values)) for values in (op.operands, op.results))
        line = (op.name, "; ".join(_attributes(op)), *types)
        self.lines[line] += 1
        return line


def _attributes(op: Any) -> Iterator[str]:
    for name in sorted(op.attributes):
        if name not in NAMES and not name.startswith(("mhlo.", "jax.")):
            yield f"{name}={SYMBOL.sub('@', str(op.attributes[name]))}"
