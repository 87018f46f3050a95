"""A program compiled in a process of its own, which can be stopped: a compiler does not listen while it works."""

import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from spqr_jax.config import Config
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.files import storage
from spqr_jax.fit import architectures, memory, planned, targets
from spqr_jax.fit.memory import Begun, Measured
from spqr_jax.fit.programs import Plan, Program
from spqr_jax.fit.targets import Target

POLL = 0.25  # seconds between two looks at the compiler's process
UNTIL = ("plan", "code")


class Job(NamedTuple):
    """A program, in words that can be sent to another process: `make(Plan, *arguments)` describes it.

    Attributes:
        config: resolved.
        devices: how many the target's mesh has, which a CPU must be told.
        make: a function of a module, as those of `spqr_jax.fit.programs`.
    """

    config: Config
    target: Target
    devices: int
    make: Callable[..., Program]
    arguments: tuple[Any, ...]

    def programs(self) -> tuple[Program, Program]:
        """The program for the target, and as a CPU computes it, for counting FLOP."""
        pipeline, mesh = architectures.pipeline(self.config), targets.mesh(self.target)
        plans = Plan.of(self.config, pipeline, mesh), Plan(self.config, pipeline, mesh)
        program, plain = (self.make(plan, *self.arguments) for plan in plans)
        return program, plain


class Wait(NamedTuple):
    """How long to wait for a compiler.

    Attributes:
        until: "code": until the program is compiled. "plan": until its memory is planned (`spqr_jax.fit.planned`).
        seconds: after these the compiler is stopped; 0: never. A plan that is there by then is the answer.
        cache: directory of earlier results, or None.
        tick: called again and again meanwhile.
        limit: bytes that are there; 0: not known. A plan that takes more is the answer, as no machine code helps.
    """

    until: str = "code"
    seconds: float = 0.0
    cache: Path | None = None
    tick: Callable[[], None] = lambda: None
    limit: int = 0

    def answered(self, until: str, total: int | None) -> bool:
        """Whether a result that goes as far as `until` ("plan", "code") is the answer. total: its bytes."""
        return UNTIL.index(until) >= UNTIL.index(self.until) or bool(self.limit and total and total > self.limit)


def measure(job: Job, wait: Wait) -> Measured:
    """What the target's compiler says of a program, or that it was stopped. Results are kept under the program's hash.

    The process is over when this returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spqr_jax.fit.worker"])
    with tempfile.TemporaryDirectory(prefix="spqr_fit_") as folder:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, folder, sender), daemon=True)
        process.start()
        sender.close()  # so that the end of the process ends the pipe
        try:
            return _answer(receiver, Path(folder), wait)
        except EOFError:
            process.join()
            killed = (process.exitcode or 0) < 0
            why = "is this machine out of memory?" if killed else "what it said stands above"
            return memory.unknown(f"its compiler ended with status {process.exitcode}; {why}")
        finally:
            process.kill()
            process.join()


def _answer(receiver: Connection, folder: Path, wait: Wait) -> Measured:
    """Wait for the process's two messages, the plan, or the end of patience. Raises EOFError if the process ends."""
    start, begun, plan = time.monotonic(), None, None
    while True:
        wait.tick()
        seconds = time.monotonic() - start
        if receiver.poll(POLL):
            said = receiver.recv()
            if isinstance(said, Measured):
                return _keep(said, begun, wait)
            start, begun = time.monotonic(), said
            if kept := _kept(begun, wait):
                return kept
        late = bool(wait.seconds) and seconds > wait.seconds
        plan = plan or (planned.read(folder) if begun else None)
        if begun and plan and (late or wait.answered("plan", planned.total(plan.parts))):
            return _keep(memory.of_plan(plan, begun, seconds), begun, wait)
        if late:
            return memory.unknown(f"stopped after {seconds:.0f} s; whether it fits is not known", seconds)


def _work(job: Job, folder: str, sender: Connection) -> None:
    """In the process: send a Begun once the program is lowered, then a Measured."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the process that started this one holds libtpu's lock
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there would have no plan
    if job.target.platform == "cpu":
        mesh_lib.split_cpu(job.devices)
    program, plain = job.programs()
    sender.send(memory.measure(program, plain, job.target, Path(folder), sender.send))


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _kept(begun: Begun, wait: Wait) -> Measured | None:
    """An earlier result that answers the question."""
    file = wait.cache / f"{begun.key}.json" if wait.cache else None
    if file is None or not file.exists():
        return None
    found = Measured(**json.loads(file.read_text(encoding="utf-8")))
    return found._replace(cached=True) if wait.answered(found.until, found.bytes) else None


def _keep(measured: Measured, begun: Begun | None, wait: Wait) -> Measured:
    if wait.cache and begun:
        wait.cache.mkdir(parents=True, exist_ok=True)
        storage.write_text(wait.cache / f"{begun.key}.json", json.dumps(measured._asdict(), indent=2) + "\n")
    return measured
