"""What a program consists of: kernels, attention left plain, products by type, collectives, copies, donated arguments.

Some of it is read from the program as it is handed to the compiler (StableHLO), where shapes and types are those of the
models, and some from what the compiler made of it (the text of its HLO). A loop counts once in both.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = re.compile(r"[a-z]+(\d+)")  # of a type's name: bf16, s32, f8e4m3; pred has none
# One line of the text: name = type opcode(operands), attributes. The type of several results is in parentheses.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
TARGET = re.compile(r'custom_call_target="([^"]+)"')
CHANNEL = re.compile(r"channel_id=(\d+)")
DONATED = re.compile(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)")


def counts(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled | None) -> dict[str, Any]:
    """`of_lowered`, and `of_compiled` if the program compiled."""
    return of_lowered(lowered) | (of_compiled(compiled.as_text() or "") if compiled else {})


# --- as it is handed to the compiler


class Product(NamedTuple):
    """A matrix product or a convolution: its types ("bf16", "f32"), the shapes of its operands, and its FLOP."""

    kind: str
    type: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    flop: float


def of_lowered(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """{"plain", "products"} of a program before it is compiled; shapes are those over all devices.

    plain: attention without a kernel, as a list of {"queries", "keys", "number"}, the most queries first.
    products: for each type ("f32" if any operand is float32) {"product", "convolution": how many, "flop", "largest"}.
    """
    operations = list(_operations(lowered.compiler_ir("stablehlo")))
    products: dict[str, list[Product]] = {}
    for product in filter(None, map(_product, operations)):
        products.setdefault(product.type, []).append(product)
    found = Counter(_plain(operations))
    plain = [{"queries": q, "keys": k, "number": n} for (q, k), n in sorted(found.items(), reverse=True)]
    return {"plain": plain, "products": {name: _summary(products[name]) for name in sorted(products)}}


def _summary(products: list[Product]) -> dict[str, Any]:
    number = Counter(product.kind for product in products)
    largest = max(products, key=lambda product: product.flop)
    named = f"{largest.kind} of {list(largest.shapes[0])} with {list(largest.shapes[1])}, {largest.flop:.3g} FLOP"
    flop = sum(product.flop for product in products)
    return {"product": number["product"], "convolution": number["convolution"], "flop": flop, "largest": named}


def _operations(module: Any) -> Iterator[Any]:
    """Every operation that the main function runs, those of the functions that it calls at each call."""
    functions = {function.attributes["sym_name"].value: function for function in module.body.operations}

    def inside(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    yield inner.operation
                    yield from inside(inner)
                    if inner.operation.name == "func.call":
                        yield from inside(functions[inner.attributes["callee"].value])

    yield from inside(functions["main"])


def _product(operation: Any) -> Product | None:
    """What a matrix product or a convolution is, None of another operation."""
    if operation.name not in ("stablehlo.dot_general", "stablehlo.convolution"):
        return None
    left, right = (ir.RankedTensorType(operand.type) for operand in operation.operands)
    result = math.prod(ir.RankedTensorType(operation.results[0].type).shape)
    if operation.name == "stablehlo.dot_general":
        kind, each = "product", math.prod(left.shape[axis] for axis in _contracted(operation)[0])
    else:
        numbers = stablehlo.ConvDimensionNumbers(operation.attributes["dimension_numbers"])
        kind, each = "convolution", math.prod(right.shape) // right.shape[numbers.kernel_output_feature_dimension]
    types = {str(left.element_type), str(right.element_type)}
    name = "f32" if "f32" in types else str(left.element_type)
    return Product(kind, name, (tuple(left.shape), tuple(right.shape)), 2.0 * result * each)


def _contracted(product: Any) -> tuple[list[int], list[int]]:
    numbers = stablehlo.DotDimensionNumbers(product.attributes["dot_dimension_numbers"])
    return numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions


def _plain(operations: list[Any]) -> Iterator[tuple[int, int]]:
    """(queries, keys) of every softmax between two products.

    It is an exponential of a difference (of scores and their largest), whose last axis some product contracts.
    """
    weights = set()
    for operation in operations:
        if operation.name == "stablehlo.dot_general":
            for operand, contracted in zip(operation.operands, _contracted(operation), strict=True):
                shape = tuple(ir.RankedTensorType(operand.type).shape)
                weights |= {shape} if list(contracted) == [len(shape) - 1] else set()
    for operation in operations:
        if operation.name == "stablehlo.exponential" and _is_difference(operation.operands[0]):
            shape = tuple(ir.RankedTensorType(operation.results[0].type).shape)
            if len(shape) > 1 and shape in weights:
                yield shape[-2], shape[-1]


def _is_difference(value: Any) -> bool:
    return not isinstance(value.owner, ir.Block) and value.owner.name == "stablehlo.subtract"


# --- as the compiler made it


class Instruction(NamedTuple):
    """One line of HLO. bytes: of all its results. operands: the rest of the line, its attributes too."""

    name: str
    opcode: str
    bytes: int
    rest: str


def of_compiled(text: str) -> dict[str, Any]:
    """{"flash", "collectives", "transposes", "copies", "donated"} in the text of compiled HLO; of one device.

    flash: calls of kernels for attention, {"forward", "backward"}; what the backward pass computes again is forward.
    collectives: by kind, {"number", "bytes"}, the bytes of the larger side, which of a gathered array is the whole.
    transposes, copies: {"number", "bytes"}, those inside of fused loops too, but not what a TPU copies between its
    memories meanwhile. donated: arguments whose memory outputs take over.
    """
    instructions = list(_instructions(text))
    flash = Counter(direction for i in instructions if (direction := _flash(i)))
    return {
        "flash": {"forward": flash["forward"], "backward": flash["backward"]},
        "collectives": _collectives(instructions),
        "transposes": _tally(i.bytes for i in instructions if i.opcode == "transpose"),
        "copies": _tally(i.bytes for i in instructions if i.opcode == "copy"),
        "donated": len(DONATED.findall(text.partition("\n")[0])),
    }


def _instructions(text: str) -> Iterator[Instruction]:
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            yield Instruction(found[1], found[3], _bytes(found[2]), found[4])


def _bytes(types: str) -> int:
    """Bytes of the arrays of a type, "(bf16[8,64]{1,0}, s32[])"."""
    return (
        sum(_bits(name) * math.prod(int(n) for n in shape.split(",") if n) for name, shape in ARRAY.findall(types)) // 8
    )


def _bits(name: str) -> int:
    found = BITS.match(name)
    return int(found[1]) if found else 8


def _tally(sizes: Iterable[int]) -> dict[str, int]:
    sizes = list(sizes)
    return {"number": len(sizes), "bytes": sum(sizes)}


def _flash(instruction: Instruction) -> str:
    """ "forward" or "backward" for a kernel for attention, else "". On a TPU the backward pass is two kernels."""
    target = TARGET.search(instruction.rest) if instruction.opcode == "custom-call" else None
    if not target:
        return ""
    if target[1].startswith("__cudnn$fmha"):
        return "backward" if target[1].endswith("Backward") else "forward"
    if target[1] != "tpu_custom_call" or "flash" not in instruction.name or "bwd_dq" in instruction.name:
        return ""
    return "backward" if "bwd" in instruction.name else "forward"


def _collectives(instructions: list[Instruction]) -> dict[str, dict[str, int]]:
    sizes: dict[str, dict[str, int]] = {kind: {} for kind in COLLECTIVES}
    known: dict[str, int] = {}
    for i in instructions:
        known[i.name] = i.bytes
        kind = i.opcode.removesuffix("-start")
        if kind in sizes:
            operands = re.findall(r"%([\w.$-]+)", i.rest.partition(")")[0])
            given = sum(known.get(name, 0) for name in operands)
            # The start of an asynchronous one has its operands among its results, but for sums.
            made = i.bytes - given if i.opcode.endswith("-start") and kind != "all-reduce" else i.bytes
            # A TPU's compiler writes one that it does meanwhile several times, on a channel of its own. Combined ones
            # are all on channel 1.
            channel = CHANNEL.search(i.rest)
            own = channel[1] if channel and channel[1] != "1" else i.name
            sizes[kind][own] = max(given, made, sizes[kind].get(own, 0))
    return {kind: _tally(found.values()) for kind, found in sizes.items() if found}
