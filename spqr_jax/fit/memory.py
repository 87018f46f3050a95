"""One program compiled for a target: its memory, its FLOP, the compiler's time, or the reason why there is none."""

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jaxlib

from spqr_jax.devices import target as target_lib
from spqr_jax.fit import flop, hlo, planned, targets
from spqr_jax.fit.programs import Program
from spqr_jax.fit.targets import TRITON, Target

PLANNED = "its memory is planned; machine code was not generated, so its own size is not in the bytes"
NO_TILES = "Couldn't find output tile sizes"
NO_TRITON = f"compiled with {TRITON}=false, as no device is there"
FIELDS = ("argument", "output", "temp", "alias")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How compilers say what a program would take: libtpu, twice, and the GPU compiler's rematerialisation.
NEEDED = (
    r"total memory required for [\w ]+\(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of",
)


class Measured(NamedTuple):
    """What a compiler said about one program. Bytes are those on one device.

    Attributes:
        compiles: whether it compiled. A compiler of a TPU refuses a program that takes more memory than there is.
        bytes: arguments, outputs and temporaries, aliased ones once; what the compiler says it would need if it refused
            the program for its memory; None if it does not say.
        parts: bytes of "arguments", "outputs", "temporaries" and "aliased".
        flops: FLOP on one device, counted in the program as a CPU computes it (`flop.flop`).
        compiler_flops: the compiler's own count, where there is one. A loop counts once there.
        compile_s: seconds in the compiler.
        reason: why it did not compile; "" if it did.
        note: what the compiler had to be told, or why this is not the whole; "" if nothing.
        cached: whether this was known from an earlier time.
        until: "code": the compiler came to its end. "plan": it was stopped when it had planned the program's memory.
        hlo: what the program consists of (`spqr_jax.fit.hlo.counts`); None if it was not even traced.
    """

    compiles: bool
    bytes: int | None
    parts: dict[str, int]
    flops: float
    compiler_flops: float | None
    compile_s: float
    reason: str
    note: str = ""
    cached: bool = False
    until: str = "code"
    hlo: dict[str, Any] | None = None

    def memory_analysis(self) -> Any:
        """As that of jax.stages.Compiled, for `spqr_jax.sampling.batch_size`. Raises as a compiler without memory."""
        if self.bytes is None:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.reason}")
        sizes = dict.fromkeys((f"{field}_size_in_bytes" for field in FIELDS), 0)
        return SimpleNamespace(**sizes | {"temp_size_in_bytes": self.bytes})


class Begun(NamedTuple):
    """A program that is handed to its compiler: its hash, its FLOP on one device, what it consists of so far."""

    key: str
    flops: float
    hlo: dict[str, Any]


def measure(program: Program, plain: Program, target: Target, folder: Path, begin: Callable[[Begun], None]) -> Measured:
    """Trace, lower and compile a program.

    plain: the same program as a CPU computes it, without kernels whose FLOP cannot be seen; they are counted there.
    folder: an empty one, where the compiler writes its plan down. begin: called before the compiler is. What a layer or
    a compiler raises is the reason in the result.
    """
    count = 0.0
    try:
        count = flop.flop(plain.trace().jaxpr.jaxpr) / program.devices
        lowered = program.trace().lower()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return _refused(error, count, 0.0)
    begin(Begun(_key(lowered, target), count, hlo.of_lowered(lowered)))
    return _compiled(lowered, count, targets.options(target) | {planned.DUMP: str(folder)})


def of_plan(plan: planned.Planned, begun: Begun, seconds: float) -> Measured:
    """The result for a program whose compiler was stopped when it had planned the memory."""
    consists, parts = begun.hlo | hlo.of_compiled(plan.program), plan.parts
    how: dict[str, Any] = {"note": PLANNED, "until": "plan", "hlo": consists}
    return Measured(True, planned.total(parts), parts, begun.flops, None, round(seconds, 1), "", **how)


def unknown(reason: str, seconds: float = 0.0) -> Measured:
    """The result for a program of which the compiler said nothing."""
    return Measured(False, None, {}, 0.0, None, round(seconds, 1), reason)


def _compile(lowered: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """The compiled program, and what the compiler was told for it. Raises as the compiler."""
    try:
        return lowered.compile(options), NO_TRITON if TRITON in options else ""
    except RuntimeError as error:
        if NO_TILES not in str(error) or TRITON in options:
            raise
    return lowered.compile(options | {TRITON: False}), NO_TRITON


def _compiled(lowered: Any, count: float, options: dict[str, Any]) -> Measured:
    start = time.perf_counter()
    try:
        compiled, note = _compile(lowered, options)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        return _refused(error, count, time.perf_counter() - start)._replace(hlo=hlo.counts(lowered, None))
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = {field: int(getattr(memory, f"{field}_size_in_bytes")) for field in FIELDS}
    parts = dict(zip(("arguments", "outputs", "temporaries", "aliased"), sizes.values(), strict=True))
    consists = hlo.counts(lowered, compiled)
    return Measured(
        True, planned.total(parts), parts, count, cost.get("flops"), round(seconds, 1), "", note, hlo=consists
    )


def _refused(error: Exception, count: float, seconds: float) -> Measured:
    """The result for a program that does not compile."""
    message = str(error)
    needed = next((found for pattern in NEEDED if (found := re.search(pattern, message))), None)
    total = int(float(needed[1]) * UNITS[needed[2]]) if needed else None
    lines = message.strip().splitlines() or ["no message"]
    return Measured(False, total, {}, count, None, round(seconds, 1), f"{type(error).__name__}: {lines[0][:400]}")


def _key(lowered: Any, target: Target) -> str:
    """A hash of the program, the target, the compilers and their flags, and what is kept."""
    told = os.environ.get("XLA_FLAGS"), target_lib.step_options(target.platform)
    versions = (jax.__version__, jaxlib.__version__, _compiler(target), *told, Measured._fields)
    text = repr((target.name, target.topology, versions)) + lowered.as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compiler(target: Target) -> str:
    """Version of the compiler's own package, where it has one."""
    from importlib.metadata import PackageNotFoundError, version

    for name in {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin")}.get(target.platform, ()):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""
