"""The programs of a run traced for every backbone."""

import pytest

from spqr_jax import backbones
from spqr_jax.config import BFT, Config, Generation
from spqr_jax.fit import programs, targets
from spqr_jax.fit.programs import Plan
from spqr_jax.methods.contract import tiny
from spqr_jax.run import protocol

SIDE = tiny.SIDE * tiny.FACTOR
PROGRAMS = {
    "text encoding": programs.text_encoding,
    "image encoding": programs.image_encoding,
    "training step, moderate": lambda plan: programs.training_step(plan, "moderate"),
    "sampler": lambda plan: programs.whole_sampler(plan, 1),
    "sampler: one evaluation": lambda plan: programs.evaluation(plan, 1),
    "sampler: decoder": lambda plan: programs.decoder(plan, 1),
}


@pytest.mark.parametrize("key", [backbone.key for backbone in backbones.BACKBONES])
def test_every_backbone_has_every_program(key):
    pipeline = tiny.pipeline(key)
    flows = backbones.of(pipeline).noising.prediction == "flow"
    generation = Generation(scheduler="flow_euler" if flows else "ddim", steps=2, height=SIDE, width=SIDE)
    bft = BFT(samples=4, batch_size=2, resolution=SIDE, curriculum=())
    config = protocol.resolve(Config(protocol="spqr-jax", generation=generation, bft=bft))
    plan = Plan.of(config, pipeline, targets.mesh(targets.find("cpu")))
    for name, make in PROGRAMS.items():
        program = make(plan)
        assert program.name == name
        assert program.trace().jaxpr.jaxpr.eqns, name
