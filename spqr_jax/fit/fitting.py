"""The answer for a config and a target: every program measured, and remedies tried where one does not fit."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.config import Config, Subject
from spqr_jax.devices import memory
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.fit import architectures, programs, rehearsal, storage, targets, work, worker
from spqr_jax.fit.memory import Measured
from spqr_jax.fit.programs import Plan, Program
from spqr_jax.fit.rehearsal import Note, Rehearsal
from spqr_jax.fit.targets import Target
from spqr_jax.fit.worker import Job, Wait
from spqr_jax.methods.tools import loop
from spqr_jax.run import protocol
from spqr_jax.sampling import batch_size
from spqr_jax.training.memory import Way, choose

SHARE = 0.35  # of the peak, unless told otherwise
SAMPLERS = ("whole", "parts")


class Asked(NamedTuple):
    """How to answer.

    Attributes:
        sampler: "whole": the sampling loop as one program. "parts": one evaluation, and the decoder. "": parts where a
            program for a TPU is compiled to its end, which takes many minutes for the whole.
        each: images on each device that are tried first; 0: as a run does.
        share: share of the peak in the estimate of hours.
        cache: directory of earlier results, or None.
        report: called with (program, None) before and during, and with (program, Measured) after each compilation.
        until: "code": compile programs to their end. "plan": stop when their memory is planned. "": plan for a TPU,
            whose compiler takes many minutes for the rest.
        seconds: after these a compiler is stopped; 0: never.
    """

    sampler: str = ""
    each: int = 0
    share: float = SHARE
    cache: Path | None = None
    report: Callable[[Program, Measured | None], None] = lambda program, measured: None
    until: str = ""
    seconds: float = 0.0

    def ends(self, target: Target) -> str:
        """Where compilation ends: `until`, or what it stands for."""
        return self.until or ("plan" if target.platform == "tpu" else "code")

    def wait(self, program: Program, target: Target) -> Wait:
        """How long to wait for the compiler of a program."""
        return Wait(self.ends(target), self.seconds, self.cache, lambda: self.report(program, None), target.limit)


class Question(NamedTuple):
    """A config and a target, and how to answer.

    Attributes:
        plan: with models that are told the target.
    """

    plan: Plan
    target: Target
    asked: Asked

    @classmethod
    def of(cls, config: Config, target: Target, asked: Asked) -> "Question":
        pipeline, mesh = architectures.pipeline(config), targets.mesh(target)
        return cls(Plan.of(config, pipeline, mesh), target, asked)

    def computed(self, way: Way) -> "Question":
        """The same for a config that asks for one way to compute the steps of fine-tuning."""
        config = self.plan.config
        changed = dataclasses.replace(
            config,
            bft=dataclasses.replace(config.bft, accumulate=way.accumulate, remat=way.remat),
            mesh=dataclasses.replace(config.mesh, fsdp=way.fsdp),
        )
        return self._replace(plan=self.plan._replace(config=changed))

    def measure(self, make: Callable[..., Program], *arguments: Any) -> tuple[Program, Measured]:
        """The program that `make(plan, *arguments)` describes, and what the compiler says of it."""
        program, config = make(self.plan, *arguments), self.plan.config
        job = Job(config, self.target, self.plan.mesh.size, make, arguments)
        measured = worker.measure(job, self.asked.wait(program, self.target))
        self.asked.report(program, measured)
        return program, measured

    def row(self, program: Program, measured: Measured, **more: Any) -> dict[str, Any]:
        """The entry of fit.json for one program."""
        total = None if measured.bytes is None else measured.bytes + program.beside
        said = measured._asdict() | {"bytes": total, "beside_bytes": program.beside}
        fits = measured.compiles and total is not None and total <= self.target.limit
        limit = {"limit_bytes": self.target.limit, "limit_source": self.target.source}
        more = {"devices": program.devices, **program.about, **more}
        return {"program": program.name, "fits": fits, **said, **limit, **more}


def answer(config: Config, target: Target, asked: Asked) -> dict[str, Any]:
    """What fit.json holds: {"target", "programs", "fits", "hours", ...}; see docs/accelerators.md.

    Raises ValueError for an unknown base, ModuleNotFoundError and RuntimeError as `targets.mesh`.
    """
    config = protocol.resolve(config)
    question = Question.of(config, target, asked)
    rehearsals = rehearsal.of(question.plan)
    rows, devices = list(_rows(question, rehearsals)), question.plan.mesh.devices
    return {
        "target": target.name,
        "devices": devices.size,
        "device_kind": devices.flat[0].device_kind,
        "base": config.base,
        "dtype": config.dtype,
        "protocol": config.protocol,
        "fits": all(row["fits"] for row in rows),
        "programs": rows,
        "not_compiled": programs.left_out(config, [each.refused for each in rehearsals if each.refused]),
        **storage.needed(question.plan),
        "hours": work.hours(_items(question, rows), target, config.dtype, asked.share),
    }


def count(config: Config) -> int:
    """Programs that are asked about at least, for a progress bar."""
    return 3 + len(programs.trained(config)) + _safe(config)


def _rows(question: Question, rehearsals: list[Rehearsal]) -> Iterator[dict[str, Any]]:
    for make in (programs.text_encoding, programs.image_encoding):
        yield question.row(*question.measure(make))
    for profile in programs.trained(question.plan.config):
        yield _training(question, profile)
    yield from _aligning(question, rehearsals)
    yield from _sampling(question)


# --- training


# A question, and make and arguments for its `measure`.
Asking = tuple[Question, Callable[..., Program], tuple[Any, ...]]


class Open(NamedTuple):
    """A program that a run can compute in several ways, of which it takes the first that fits.

    Attributes:
        name: in messages.
        ways: in the order in which they are tried.
        asked: what is asked about it for a way.
        fixed: fsdp -> bytes of what no way makes smaller. Raises ValueError if the devices cannot share the batch.
        remedy: what to do if nothing fits; "": as `choose` says.
    """

    name: str
    ways: Sequence[Way]
    asked: Callable[[Way], Asking]
    fixed: Callable[[bool], int]
    remedy: str = ""

    def measure(self, way: Way) -> tuple[Program, Measured]:
        question, make, arguments = self.asked(way)
        return question.measure(make, *arguments)

    def program(self, way: Way) -> Program:
        question, make, arguments = self.asked(way)
        return make(question.plan, *arguments)


def _training(question: Question, profile: str) -> dict[str, Any]:
    """The row of a training step."""
    return _chosen(
        question,
        Open(
            profile,
            programs.ways(question.plan),
            lambda way: (question.computed(way), programs.training_step, (profile,)),
            lambda fsdp: programs.step(question.plan, profile).fixed_bytes(fsdp),
        ),
    )


def _aligning(question: Question, rehearsals: list[Rehearsal]) -> Iterator[dict[str, Any]]:
    """The rows of what methods train with, until the plan unless asked for code: they are many."""
    question = question._replace(asked=question.asked._replace(until=question.asked.until or "plan"))
    for each in rehearsals:
        for number, note in enumerate(each.notes):
            yield _chosen(
                question,
                Open(
                    note.name,
                    loop.ways(question.plan.mesh.size),
                    functools.partial(_noted, question, each.subject, number, note.name),
                    functools.partial(_held_bytes, question, note),
                    loop.REMEDY,
                ),
            )


def _noted(question: Question, subject: Subject, number: int, name: str, way: Way) -> Asking:
    return question, rehearsal.step, (subject, number, name, way)


def _held_bytes(question: Question, note: Note, fsdp: bool) -> int:
    return note.held.fixed_bytes(question.plan.mesh if fsdp else None)


def _chosen(question: Question, what: Open) -> dict[str, Any]:
    """The row of a program computed as a run would choose, with what was tried before."""
    limit, seen = _run_limit(question.target), dict[Way, tuple[Program, Measured]]()
    way, failure = what.ways[0], ""
    try:
        needed = _needed(what, limit, seen)
        how: dict[str, Any] = {"limit": limit, "what": what.name, "remedy": what.remedy}
        way = choose(what.ways, needed, fixed=functools.cache(what.fixed), **how)
    except MemoryError as error:
        way, failure = min(seen, key=lambda way: seen[way][1].bytes or sys.maxsize, default=way), str(error)
        if not seen:  # weights and state alone are too much
            told = "not compiled, as it cannot fit"
            seen[way] = what.program(way), Measured(False, what.fixed(way.fsdp), {}, 0.0, None, 0.0, told)
    except ValueError:
        way = list(seen)[-1] if seen else way
    if way not in seen:  # the config leaves nothing open, or the devices cannot share the batch
        seen[way] = what.measure(way)
    row = question.row(*seen[way])
    tried = [w._asdict() | _short(question, *seen[w]) | {"fits": False} for w in seen if w != way]
    fits = {"fits": row["fits"] and not failure, "limit_bytes": limit if len(what.ways) > 1 else row["limit_bytes"]}
    return row | fits | ({"tried": tried, "remedy": failure} if tried or failure else {})


def _needed(what: Open, limit: int, seen: dict[Way, tuple[Program, Measured]]) -> Callable[[Way], int | None]:
    """A function way -> bytes of the program, for `choose`; it adds what it measures to `seen`."""

    def needed(way: Way) -> int | None:
        seen[way] = what.measure(way)
        measured = seen[way][1]
        if measured.compiles or measured.bytes is None:
            if not measured.compiles and "RESOURCE_EXHAUSTED" not in measured.reason:
                raise ValueError(measured.reason)
            return measured.bytes
        return max(measured.bytes, limit + 1)  # refused, whatever the number says

    return needed


# --- sampling


def _sampling(question: Question) -> Iterator[dict[str, Any]]:
    """The rows of the sampler, at the batch that a run would take."""
    if not _whole(question):
        row = _sampler(question, programs.evaluation)
        yield row
        yield question.row(*question.measure(programs.decoder, row["batch"] // question.plan.mesh.size))
        return
    yield _sampler(question, programs.whole_sampler)
    if _safe(question.plan.config):
        yield _sampler(question, programs.safe_sampler)


def _safe(config: Config) -> bool:
    """Whether a subject is sampled with Safe Latent Diffusion."""
    return any(subject.method == "sld" for subject in config.subjects)


def _sampler(question: Question, make: Callable[..., Program]) -> dict[str, Any]:
    """The row of one sampler, at the batch that a run would take."""
    seen: dict[int, tuple[Program, Measured]] = {}

    def compiled(each: int) -> Measured:
        program, measured = seen[each] = question.measure(make, each)
        if not measured.compiles and measured.bytes is None and "RESOURCE_EXHAUSTED" not in measured.reason:
            raise ValueError(measured.reason)
        return measured._replace(bytes=None if measured.bytes is None else measured.bytes + program.beside)

    first = _most(question)
    weights = sum(mesh_lib.bytes_each(tree) for tree in programs.sampler_weights(question.plan).values())
    limit, failure = _run_limit(question.target), ""
    try:
        each = batch_size.largest(compiled, first, weights=weights, limit=limit)
    except (MemoryError, ValueError) as error:
        each, failure = min(seen), str(error) if isinstance(error, MemoryError) else ""
    shown = _shown(question, first, each)
    return question.row(*seen[shown], **_tried(question, seen, shown, each, failure))


def _shown(question: Question, first: int, each: int) -> int:
    """Images on each device of the row: those that the config asks for, else those that fit, as a run takes them."""
    return first if question.plan.config.generation.batch_size else each


def _tried(
    question: Question, seen: dict[int, tuple[Program, Measured]], shown: int, each: int, failure: str
) -> dict[str, Any]:
    """What else was compiled for a sampler's row, and the batch to take instead if this one does not fit."""
    devices = question.plan.mesh.size
    tried = [{"batch": n * devices, **_short(question, *seen[n])} for n in seen if n != shown]
    remedy = failure or (f"--config.generation.batch_size={each * devices}" if each != shown else "")
    return {"tried": tried, "remedy": remedy}


def _short(question: Question, program: Program, measured: Measured) -> dict[str, Any]:
    row = question.row(program, measured)
    return {name: row[name] for name in ("fits", "bytes", "compile_s", "reason")}


def _whole(question: Question) -> bool:
    slow = question.target.platform == "tpu" and question.asked.ends(question.target) == "code"
    return (question.asked.sampler or ("parts" if slow else "whole")) == "whole"


def _most(question: Question) -> int:
    """Images on each device that are tried first: as asked, as the config says, or the most that save time."""
    generation, plan = question.plan.config.generation, question.plan
    height, width, _ = programs.sampled_shape(plan)
    if question.asked.each:
        return question.asked.each
    if generation.batch_size:
        return -(-generation.batch_size // plan.mesh.size)
    return batch_size.worthwhile(height * width, plan.mesh)


def _run_limit(target: Target) -> int:
    """Bytes that a run leaves to one program (`devices.memory.memory_limit`)."""
    return target.limit if target.platform == "cpu" else int(memory.SHARE * target.limit)


# --- the whole config


def _items(question: Question, rows: list[dict[str, Any]]) -> list[work.Item]:
    """The work of the config, each kind with the FLOP of one, from the rows."""
    whole = work.of(question.plan.config)
    flops = {row["program"]: row["flops"] * row["devices"] for row in rows}
    batch = {row["program"]: row["batch"] for row in rows}
    items = [work.Item("image encoded", whole.encoded, flops["image encoding"] / batch["image encoding"])]
    items += [work.Item(f"step, {p}", steps, flops[f"training step, {p}"]) for p, steps in whole.steps.items()]
    if "sampler" in flops:
        drawn = flops["sampler"] / batch["sampler"]
    else:
        one, decoded = "sampler: one evaluation", "sampler: decoder"
        drawn = (programs.evaluations(question.plan) * flops[one] + flops[decoded]) / batch[one]
    return [*items, work.Item("image drawn", whole.pictures, drawn)]
