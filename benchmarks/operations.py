"""What a training step of ours spends its time on, by XLA's own profile.

    python -m benchmarks.operations --model mini [--profiles lite,moderate,standard]

A step is compiled and run as `finetune.train` does it. Its operations are sorted by what they hold: products (matrix
products and convolutions), joins (among them the patches of convolutions), sums and means, and the rest, which goes
through arrays element by element; and by their part of the step. Milliseconds are those of one step, all devices
together: with two devices side by side, twice the clock's. The profile itself takes a few percent.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import models, side_by_side
from benchmarks.models import Workload
from spqr_jax.devices import huge_pages

KINDS = {
    "between devices": {"all-reduce", "all-gather", "reduce-scatter"},
    "products": {"dot", "convolution"},
    "joins": {"concatenate"},
    "sums and means": {"reduce"},
}
MODULE = "jit_step"  # of `training.step.train_step`
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(", re.MULTILINE)
Operation = tuple[str, str]  # kind, part of the step


def sorted_operations(hlo: str) -> dict[str, Operation]:
    """The operations of a compiled program's text by name: what they are, and their part of the step."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL))
    fused = {name: {op for _, op in INSTRUCTION.findall(body)} for name, body in bodies.items()}
    found: dict[str, Operation] = {}
    for line in hlo.splitlines():
        if instruction := INSTRUCTION.match(line):
            name, op = instruction.groups()
            called = re.search(r"calls=%?([\w.\-]+)", line)
            found[name] = (_kind(fused.get(called[1], {op}) if called else {op}), _part(line))
    return found


def _kind(operations: set[str]) -> str:
    """The first kind of which an operation is there."""
    return next((kind for kind, held in KINDS.items() if operations & held), "element by element")


def _part(line: str) -> str:
    """The part that JAX's own name of an operation tells: differentiated, transposed, or neither."""
    said = re.search(r'op_name="([^"]*)"', line)
    name = said[1] if said else ""
    return "backward" if "transpose(" in name else "forward" if "jvp(" in name else "optimiser and the rest"


def milliseconds(trace: Path, operations: dict[str, Operation], steps: int) -> collections.Counter[Operation]:
    """Milliseconds a step by kind and part, from a profile of that many steps."""
    from jax.profiler import ProfileData

    (file,) = trace.rglob("*.xplane.pb")
    total: collections.Counter[Operation] = collections.Counter()
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in operations and dict(event.stats).get("hlo_module") == MODULE:
                    total[operations[event.name]] += event.duration_ns / 1e6 / steps
    return total


def table(total: collections.Counter[Operation]) -> list[dict[str, Any]]:
    """A row for every kind, from the largest, with its milliseconds by part and its share."""
    kinds: collections.Counter[str] = collections.Counter()
    for (kind, _), value in total.items():
        kinds[kind] += value
    parts = ("forward", "backward", "optimiser and the rest")
    return [
        {"milliseconds a step": kind, **{part: total[kind, part] for part in parts}, "share": value / kinds.total()}
        for kind, value in kinds.most_common()
    ]


def profiled(directory: Path, workload: Workload, profile: str, steps: int) -> list[dict[str, Any]]:
    """The table of one fine-tuning profile."""
    import jax

    import convert
    from benchmarks.finetuning_speed import data
    from spqr_jax import data as data_lib
    from spqr_jax import finetune
    from spqr_jax.devices import mesh as mesh_lib

    mesh_lib.split_cpu(workload.cpu_devices)
    mesh, pipeline = mesh_lib.make(), convert.load(directory)
    options: dict[str, Any] = {"steps": steps, "batch_size": workload.training_batch, "mesh": mesh}
    dataset = data_lib.from_arrays(*data(workload, workload.training_batch))
    way = finetune.way_to_fit(pipeline, dataset, profile, **options)
    side = (workload.training_side, workload.training_side)
    step = finetune.step_of(pipeline, profile, side, finetune.Options(**options), mesh)
    operations = sorted_operations(step.trace(way).lower().compile().as_text())
    finetune.train(pipeline, dataset, profile, **options)  # compiles
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            finetune.train(pipeline, dataset, profile, **options)
        return table(milliseconds(Path(folder), operations, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.WORKLOADS, default="mini")
    parser.add_argument("--profiles", default="lite,moderate,standard")
    parser.add_argument("--steps", type=int, default=10, help="that are profiled")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory, workload = models.directory(flags.model, Path(folder)), models.WORKLOADS[flags.model]
        found = {name: profiled(directory, workload, name, flags.steps) for name in flags.profiles.split(",")}
    side_by_side.print_report(f"Operations of a training step, {flags.model}", found)


if __name__ == "__main__":
    huge_pages.restart()
    main()
