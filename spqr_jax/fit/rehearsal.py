"""What a method trains with, found by a rehearsal: the method runs on shapes, and nothing is computed.

The weights are traced, so that whatever JAX would compute has a shape and no value. Meanwhile `_stage` replaces what
needs values. A training takes no step but notes the program of its steps. Images, their latents and samples are blank.
A value that a method asks for is one.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spqr_jax import backbones, generate, methods
from spqr_jax.concepts import Concept
from spqr_jax.config import Subject
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.fit.programs import Plan, Program
from spqr_jax.methods import mace
from spqr_jax.methods.base import Method, defaults
from spqr_jax.methods.tools import closed_form, element_mask, held, loop
from spqr_jax.methods.tools.held import Held
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names
from spqr_jax.sampling import partial
from spqr_jax.training import latents
from spqr_jax.training.memory import Way

STEPLESS, OWN_LOOP = ("none", "uce", "rece", "sld"), ("resalign",)
MOST = 64  # steps of a training whose arguments are looked at: shapes may change from step to step


class Note(NamedTuple):
    """The program of the steps of one training.

    Attributes:
        name: what the method calls the training.
        key: what the program is compiled for, but for inputs of a step.
        held: shapes of what a training keeps on the devices.
        given: those of a step's own inputs.
        trace: (arguments as shapes, way, mesh) -> jax.stages.Traced.
    """

    name: str
    key: Any
    held: Held
    given: tuple[Any, ...]
    trace: Callable[[tuple[Any, ...], Way, Mesh], jax.stages.Traced]


class Rehearsal(NamedTuple):
    """A subject, the programs of its trainings, and, if there are none since it was refused, the method and why."""

    subject: Subject
    notes: list[Note]
    refused: str = ""


def of(plan: Plan) -> list[Rehearsal]:
    """The rehearsals of a config's subjects, each method with its options once."""
    found: dict[Any, Rehearsal] = {}
    for subject in plan.config.subjects:
        key = subject.method, repr(subject.options)
        if not subject.checkpoint and subject.method not in STEPLESS and key not in found:
            found[key] = _tried(plan, subject)
    return list(found.values())


def _tried(plan: Plan, subject: Subject) -> Rehearsal:
    if subject.method in OWN_LOOP:
        return Rehearsal(subject, [], f"{subject.method}, which has a loop of its own")
    try:
        return Rehearsal(subject, _rehearse(plan, subject))
    except Exception as error:  # a method may be anybody's, and this is about memory
        reason = (str(error).strip().splitlines() or [""])[0]
        return Rehearsal(subject, [], f"{subject.method}, which refuses ({type(error).__name__}: {reason[:200]})")


def _rehearse(plan: Plan, subject: Subject) -> list[Note]:
    """A subject's. Own images are blank as all are, and are not looked for.

    As in a run, a method's models do not know the devices that a step may be split over, so a TPU has no own kernel.
    """
    method = methods.find(subject.method)
    options = {name: value for name, value in subject.options.items() if name not in method.data_options}
    options = {"seed": plan.config.seed, **options}
    target = target_lib.Target(target_lib.of(plan.mesh).platform)
    pipeline = backbones.told(plan.pipeline, target) if plan.for_target else plan.pipeline
    return rehearse(pipeline, method, names.concept(plan.config), **options)


def rehearse(pipeline: Pipeline, method: Method, concept: Concept, /, **options: Any) -> list[Note]:
    """The programs of a method's trainings, each once, for a pipeline of arrays or shapes; in float32, as in a run.

    Raises what the method raises, for a backbone that it is not defined for and for a method that asks for more than
    shapes can give.
    """
    notes: list[Note] = []
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), pipeline.params)
    with _stage(notes):
        jax.eval_shape(lambda params: _end(method.align(pipeline._replace(params=params), concept, **options)), shapes)
    return [_named(method, note) for note in notes]


def _end(aligned: Pipeline) -> None:
    """Nothing, in the place of what is of no interest."""
    del aligned


def step(plan: Plan, subject: Subject, number: int, name: str, way: Way) -> Program:
    """The program of the steps of a subject's training of this number and name, as `of` gives them.

    Notes cannot be sent to the process that compiles, so the rehearsal is repeated there, and only there.
    """
    mesh = plan.mesh if way.fsdp else plan.on_one().mesh

    def trace() -> jax.stages.Traced:
        note = _rehearse(plan, subject)[number]
        shapes = note.held.arguments(note.given, mesh if way.fsdp else None)
        return note.trace(shapes if way.fsdp else mesh_lib.shapes(shapes, mesh), way, mesh)

    batch = {**defaults(methods.find(subject.method)), **subject.options}.get("batch_size", 1)
    about = {"batch": batch, "dtype": "float32", "remat": way.remat, "fsdp": way.fsdp}
    return Program(f"aligning step, {name}", about, trace, mesh.size)


def _named(method: Method, note: Note) -> Note:
    """The note with a name that begins with the method's."""
    return note if note.name.startswith(method.title) else note._replace(name=f"{method.title} {note.name}")


# --- the stage


@contextlib.contextmanager
def _stage(notes: list[Note]) -> Iterator[None]:
    """Within, methods work on shapes, and their trainings are added to `notes`."""
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (loop, "fit", functools.partial(_noted, notes)),
            (element_mask, "top", _everywhere),
            (generate, "generate", _blank_images),
            (latents, "encode", _blank_latents),
            (partial, "partial_sample", _blank_sample),
            (closed_form, "solve", _unchanged),
            (mesh_lib, "to_host", _fetched),
            (mace, "TEMPLATES", mace.TEMPLATES[:1]),  # NumPy would work on all of them
            (jax.core.Tracer, "__array__", _ones),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _noted(
    notes: list[Note],
    name: str,
    gradient: loop.Gradient,
    static: Any,
    adam: loop.Adam | loop.Sum,
    params: Any,
    inputs: Callable[[int, Any], tuple[Any, ...]],
    steps: int,
    *,
    frozen: tuple[Any, ...] = (),
    mask: Any = None,
    project: Any = None,
    progress: bool = False,
) -> Any:
    """In the place of `loop.fit`: params of the same shapes. Of different arguments the largest are noted.

    A training that is noted already, as of the last of several texts, is not looked at again.
    """
    del progress
    key = gradient, static, adam, project, held.shapes(params)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)  # not of NumPy, which would compute
    if any(note.key == key for note in notes):
        return params
    kept = Held(params, loop.transform(adam).init(params), mask, frozen)
    # The last step too: methods warm up.
    looked = np.unique(np.linspace(0, steps - 1, MOST).astype(int))
    seen = [held.shapes(inputs(int(i), params, *frozen)) for i in looked]

    def trace(shapes: tuple[Any, ...], way: Way, mesh: Mesh) -> jax.stages.Traced:
        training = loop.Training(gradient, static, adam, project, len(frozen), mesh)
        return training.update(way, target_lib.of(mesh).platform).trace(*shapes)

    notes.append(Note(name, key, held.shapes(kept), max(seen, key=_elements), trace))
    return params


def _elements(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _everywhere(scores: Any, fraction: float) -> Any:
    """In the place of `element_mask.top`."""
    del fraction
    return jax.tree.map(lambda leaf: np.broadcast_to(np.True_, leaf.shape), scores)


def _unchanged(kernel: np.ndarray, *rest: Any) -> np.ndarray:
    """In the place of `closed_form.solve`."""
    del rest
    return kernel


def _fetched(tree: Any) -> Any:
    """In the place of `mesh.to_host`."""
    return jax.tree.map(np.asarray, tree)


def _blank_images(pipeline: Any, prompts: Any, seeds: Any, **options: Any) -> np.ndarray:
    """In the place of `generate.generate`: images_u8 [N, H, W, 3]."""
    del seeds, options
    side = backbones.of(pipeline).side(pipeline)
    return np.broadcast_to(np.uint8(0), (len(prompts), side, side, 3))


def _blank_latents(pipeline: Any, dataset: Any, **options: Any) -> latents.Latents:
    """In the place of `latents.encode`."""
    del options
    size = latents.checked_size(pipeline, dataset)
    blank = np.broadcast_to(np.float32(0), (len(dataset), *backbones.of(pipeline).latent_shape(pipeline, size)))
    return latents.Latents(blank, blank)


def _blank_sample(denoiser: Any, params: Any, tables: Any, noise: Any, *rest: Any) -> jax.Array:
    """In the place of `partial.partial_sample`: latents like the noise."""
    del denoiser, params, tables, rest
    return jnp.zeros(noise.shape, jnp.float32)


def _ones(self: jax.core.Tracer, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """In the place of the values of a traced array, of which there are none. Zeros could be divided by."""
    del copy
    return np.broadcast_to(np.ones((), dtype or self.dtype), self.shape)
