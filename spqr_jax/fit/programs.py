"""The programs that a run of a config compiles, traced from shapes alone.

A run has five kinds: encoding texts, encoding images, the training step of each profile, the steps that methods train
with (`spqr_jax.fit.rehearsal`), and the sampler. Each is the function that the run itself compiles, with the run's own
arguments as shapes. The sampler can also be taken as its two parts, one guided evaluation of the denoiser and the
decoder, since the whole takes some compilers many minutes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax import backbones, finetune, profiles, protocols
from spqr_jax.backbones import Condition, text
from spqr_jax.config import Config
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import bft
from spqr_jax.run.generation import sampling_options
from spqr_jax.sampling import call as call_lib
from spqr_jax.sampling import sampler
from spqr_jax.sampling.attached.safe_guidance import SLD
from spqr_jax.sampling.call import Sampling
from spqr_jax.sampling.guidance import Guided, guided_prediction
from spqr_jax.training import latents
from spqr_jax.training.memory import Step, Way, open_ways
from spqr_jax.training.step import Memory


class Program(NamedTuple):
    """One program of a run.

    Attributes:
        name: "text encoding", "image encoding", "training step, lite", "sampler" and so on.
        about: what it was traced for, as fit.json has it: batch over all devices, resolution, dtype ...
        trace: () -> jax.stages.Traced. It may raise what the layers raise for a target that they cannot serve.
        devices: how many it runs on.
        beside: bytes on each device that the run keeps there meanwhile, and that are no arguments.
    """

    name: str
    about: dict[str, Any]
    trace: Callable[[], Any]
    devices: int = 1
    beside: int = 0


class Plan(NamedTuple):
    """What programs are traced from: a resolved config, its backbone by shapes, and the target's devices.

    Attributes:
        for_target: whether the pipeline was told the target. If not, programs are those of a CPU.
    """

    config: Config
    pipeline: Pipeline
    mesh: Mesh
    for_target: bool = False

    @classmethod
    def of(cls, config: Config, pipeline: Pipeline, mesh: Mesh) -> "Plan":
        """The plan with the pipeline told the target."""
        return cls(config, told(pipeline, mesh), mesh, for_target=True)

    def on_one(self) -> "Plan":
        """The same on the first of the devices, for what a run computes there alone."""
        mesh = Mesh(self.mesh.devices.reshape(-1)[:1], self.mesh.axis_names, axis_types=self.mesh.axis_types)
        return Plan.of(self.config, self.pipeline, mesh) if self.for_target else self._replace(mesh=mesh)

    @property
    def backbone(self) -> backbones.Backbone:
        return backbones.of(self.pipeline)

    def about(self, batch: int, size: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
        resolution = {"resolution": f"{size[1]}x{size[0]}"} if size else {}
        return {"batch": batch, **resolution, "dtype": self.config.dtype, **more}


def told(pipeline: Pipeline, mesh: Mesh) -> Pipeline:
    """The pipeline with models that are compiled for these devices: here a target is handed to the layers."""
    return backbones.told(pipeline, target_lib.of(mesh))


# --- encoding


def text_encoding(plan: Plan) -> Program:
    """All text encoders on as many texts as are encoded at once. It runs on one device."""
    plan = plan.on_one()
    texts = [str(i) for i in range(text.BATCH)]

    @jax.jit
    def encode(params: Any) -> Condition:
        return plan.backbone.condition(plan.pipeline._replace(params=params), texts, _trained_size(plan))

    backbone = plan.backbone
    weights = {
        name: leaves
        for name, leaves in plan.pipeline.params.items()
        if name not in (backbone.denoiser, backbone.autoencoder)
    }
    shapes = mesh_lib.shapes(weights, plan.mesh)
    return Program("text encoding", plan.about(len(texts)), lambda: encode.trace(shapes))


def image_encoding(plan: Plan) -> Program:
    """The autoencoder's encoder on as many training images as are encoded at once. It runs on one device."""
    plan = plan.on_one()
    component, size = plan.backbone.autoencoder, training_size(plan)
    batch = latents.images_at_once(plan.config.bft.samples, size)
    images = jax.ShapeDtypeStruct((batch, *size, 3), np.uint8)
    weights, images = mesh_lib.shapes((plan.pipeline.params[component], images), plan.mesh)
    arguments = plan.backbone, plan.pipeline.definitions[component], weights, images
    return Program("image encoding", plan.about(batch, size), lambda: latents.encode_batch.trace(*arguments))


# --- training


def training_step(plan: Plan, profile: str) -> Program:
    """One step of fine-tuning under a profile; what the config leaves open is as a run tries it first."""
    bft_config, size, way = plan.config.bft, training_size(plan), ways(plan)[0]
    about = plan.about(bft_config.batch_size, size, **way._asdict())
    about |= {"rank": bft_config.rank} if profile in profiles.WITH_ADAPTERS else {}
    return Program(f"training step, {profile}", about, lambda: step(plan, profile).trace(way), plan.mesh.size)


def trained(config: Config) -> list[str]:
    """The profiles of a config that have a step. Adapters of a file are only merged."""
    return [profile for profile in config.bft.profiles if not protocols.adapter_of(profile)]


def ways(plan: Plan) -> list[Way]:
    """The ways to compute a step that the config leaves open, in the order in which a run tries them."""
    memory = Memory(plan.config.bft.accumulate, plan.config.bft.remat)
    return open_ways(memory, plan.config.mesh.fsdp, plan.config.bft.batch_size, plan.mesh.size)


def step(plan: Plan, profile: str) -> Step:
    """The shapes of a step of fine-tuning. Raises ValueError if the devices cannot share its batch."""
    config, mesh = plan.config, plan.mesh
    finetune.check_batch(config.bft.batch_size, config.bft.accumulate or 1, mesh.size)
    steps = bft.num_steps(config.bft, profile, config.bft.samples)
    options = finetune.Options(**bft.training_options(config, profile, steps))
    return finetune.step_of(plan.pipeline, profile, training_size(plan), options, mesh)


# --- what is not traced

ATTACHED = ("spm", "modular_lora")  # methods whose attachments in sampling are not traced


def left_out(config: Config, refused: list[str]) -> list[str]:
    """The programs of a run that are not compiled. refused: methods without a rehearsal, and why."""
    named = dict.fromkeys(subject.method for subject in config.subjects if not subject.checkpoint)
    attached = [name for name in named if name in ATTACHED]
    attacks = [attack.name for attack in config.attacks]
    return [
        *(f"aligning steps of {why}" for why in refused),
        "images and samples that methods draw",
        *([f"sampling with what {' and '.join(attached)} may attach"] if attached else []),
        *([f"searches of {' and '.join(attacks)}"] if attacks else []),
        "judges",
    ]


# --- sampling


def sampling(config: Config) -> Sampling:
    """The config's options of sampling."""
    return Sampling(guidance=config.generation.guidance, **sampling_options(config))


def whole_sampler(plan: Plan, each: int) -> Program:
    """The sampler from noise to pixels, with `each` images on each device."""
    return _loop("sampler", plan, each, *_sampler_inputs(plan, each))


def safe_sampler(plan: Plan, each: int) -> Program:
    """The same with Safe Latent Diffusion, which evaluates the denoiser for a third text."""
    program, weights, noise, batch = _sampler_inputs(plan, each)
    safe = SLD().prepare(plan.pipeline, [""], batch.given.text, batch.given.text)
    program, batch = program._replace(acts=(safe.act,)), batch._replace(rows=(safe.rows,))
    return _loop("sampler, SLD", plan, each, program, weights | {"attached": (None,)}, noise, batch, (safe.numbers,))


def _loop(name: str, plan: Plan, each: int, program: Any, weights: Any, noise: Any, batch: Any, numbers: Any = ()):
    tables = call_lib.tables_of(plan.pipeline, sampling(plan.config))
    about = _about_sampling(plan, each) | {"evaluations": evaluations(plan)}
    arguments = program, weights, tables, noise, batch, numbers
    return Program(name, about, lambda: sampler.sample.trace(*arguments), plan.mesh.size)


def evaluations(plan: Plan) -> int:
    """Evaluations of the denoiser in one image, each under guidance."""
    return len(call_lib.tables_of(plan.pipeline, sampling(plan.config)).timesteps)


def evaluation(plan: Plan, each: int) -> Program:
    """One evaluation of the denoiser under guidance. The decoder's weights lie beside it, as they do in a run."""
    program, weights, noise, batch = _sampler_inputs(plan, each)
    time = mesh_lib.shapes(jax.ShapeDtypeStruct((), np.int32), plan.mesh)
    arguments = program, weights["denoiser"], noise, batch, time
    about = _about_sampling(plan, each) | {"evaluations": 1}
    beside = mesh_lib.bytes_each(weights["autoencoder"])
    return Program("sampler: one evaluation", about, lambda: _evaluate.trace(*arguments), plan.mesh.size, beside)


def decoder(plan: Plan, each: int) -> Program:
    """Latents to pixels. The denoiser's weights lie beside it, as they do in a run."""
    program, weights, noise, _ = _sampler_inputs(plan, each)
    arguments = program, weights["autoencoder"], noise
    beside = mesh_lib.bytes_each(weights["denoiser"])
    about = _about_sampling(plan, each)
    return Program("sampler: decoder", about, lambda: _decode.trace(*arguments), plan.mesh.size, beside)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(program: sampler.Program, weights: Any, noise: jax.Array, batch: sampler.Batch, time: jax.Array):
    if program.split:
        weights = mesh_lib.constrain(weights, program.split, fsdp=False)
    return guided_prediction(program.denoiser.bind(weights), batch.given, program.guided, noise, time)


@functools.partial(jax.jit, static_argnums=0)
def _decode(program: sampler.Program, weights: Any, noise: jax.Array):
    if program.split:
        weights = mesh_lib.constrain(weights, program.split, fsdp=False)
    return sampler.as_images(
        program.denoiser.backbone.decode(program.autoencoder.bind(weights), noise, program.scaling)
    )


def sampler_weights(plan: Plan) -> dict[str, Any]:
    """The weights that a sampler holds on each device, as shapes."""
    backbone, params = plan.backbone, plan.pipeline.params
    weights = {"denoiser": backbone.weights(plan.pipeline), "autoencoder": params[backbone.autoencoder], "attached": ()}
    return mesh_lib.shapes(weights, plan.mesh, fsdp=plan.config.mesh.fsdp)


def sampled_shape(plan: Plan) -> tuple[int, int, int]:
    """(h, w, C) of the latents that are sampled."""
    return plan.backbone.latent_shape(plan.pipeline, sampled_size(plan))


def _sampler_inputs(plan: Plan, each: int) -> tuple[sampler.Program, dict[str, Any], Any, sampler.Batch]:
    """Program, weights, noise and batch of the sampler without attachments."""
    backbone, pipeline, count = plan.backbone, plan.pipeline, each * plan.mesh.size
    rows = _conditions(plan, sampled_size(plan), count)
    scales: Any = jax.ShapeDtypeStruct((count,), np.float32)
    noise = jax.ShapeDtypeStruct((count, *sampled_shape(plan)), np.float32)
    noise, batch = mesh_lib.batch_shapes((noise, sampler.Batch(Guided(rows, rows, scales))), plan.mesh)
    _, free = backbone.guidance(pipeline, np.array([plan.config.generation.guidance], np.float32))
    program = sampler.Program(
        backbones.denoiser(pipeline),
        pipeline.definitions[backbone.autoencoder],
        backbone.scaling(pipeline),
        bool(free[0] > 1),
        plan.mesh if plan.config.mesh.fsdp else None,
        (),
    )
    return program, sampler_weights(plan), noise, batch


def _about_sampling(plan: Plan, each: int) -> dict[str, Any]:
    guidance = float(plan.config.generation.guidance)
    return plan.about(each * plan.mesh.size, sampled_size(plan), guidance=guidance)


# --- shapes


def _trained_size(plan: Plan) -> tuple[int, int]:
    side = plan.backbone.side(plan.pipeline)
    return side, side


def training_size(plan: Plan) -> tuple[int, int]:
    side = plan.config.bft.resolution or plan.backbone.side(plan.pipeline)
    return side, side


def sampled_size(plan: Plan) -> tuple[int, int]:
    return call_lib.size_of(plan.pipeline, sampling(plan.config))


def _conditions(plan: Plan, size: tuple[int, int], rows: int) -> Condition:
    """The shapes of a Condition of so many rows."""
    one = jax.eval_shape(
        lambda params: plan.backbone.condition(plan.pipeline._replace(params=params), [""], size), plan.pipeline.params
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)
