"""What methods train with, found without computing, beside what they train with when they run."""

import dataclasses

import jax
import pytest

from configs import mini as mini_config
from spqr_jax.config import Subject
from spqr_jax.fit import fitting, rehearsal, targets
from spqr_jax.fit.fitting import Asked
from spqr_jax.methods import METHODS
from spqr_jax.methods.contract import smallest, tiny
from spqr_jax.methods.contract.checks import CONCEPT
from spqr_jax.methods.tools import loop
from spqr_jax.training.memory import Way

# One training; one with a mask; several, one after the other. The others take longer.
TRAINED = ["esd", "salun", "stereo"]
LONGER = ["modular_lora", "mace", "spm", "fmn", "erasediff", "scissorhands", "advunlearn", "safety_dpo"]


def described(arguments):
    leaves, structure = jax.tree.flatten(arguments)
    kinds = [leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf) for leaf in leaves]
    return [(kind.shape, str(kind.dtype)) for kind in kinds], str(structure)


@pytest.mark.parametrize("name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)])
def test_the_programs_are_those_that_the_method_compiles(name, monkeypatch):
    """Functions, static parts, and the shapes of all arguments; nothing is trained in the rehearsal."""
    compiled, pipeline, options = [], tiny.pipeline("sd"), smallest.options(METHODS[name])

    def fitting_(_, training, held, given):
        compiled.append((*training[:4], *described(held.arguments(given, None))))
        stand_in = lambda params, state, mask, *inputs: (params, state, (0.0, 0.0))  # noqa: E731
        monkeypatch.setattr(loop.Training, "update", lambda self, way, platform="": stand_in)
        return Way()

    notes = rehearsal.rehearse(pipeline, METHODS[name], CONCEPT, seed=0, **options)
    monkeypatch.setattr(loop, "fitting", fitting_)
    METHODS[name].align(pipeline, CONCEPT, seed=0, **options)
    noted = [(*note.key[:4], *described(note.held.arguments(note.given, None))) for note in notes]
    assert all(program in compiled for program in noted)
    assert all(program in noted for program in compiled)


def test_an_option_may_be_named_method():
    """That of ESD is; its cross-attention is less than the rest."""
    cross = {"steps": 1, "method": "esd-x"}
    (few,), (many,) = (
        rehearsal.rehearse(tiny.pipeline("sd"), METHODS["esd"], CONCEPT, **options) for options in (cross, {"steps": 1})
    )
    assert few.held.fixed_bytes(None) < many.held.fixed_bytes(None)


def question(*subjects, **asked):
    config = dataclasses.replace(fitting.protocol.resolve(mini_config.get_config()), subjects=subjects)
    return fitting.Question.of(config, targets.find("cpu"), Asked(**asked))


def test_a_step_of_a_method_is_compiled_for_the_target_in_float32():
    asked = question(Subject("one", "esd", {"batch_size": 2}), Subject("two", "esd", {"batch_size": 2}))
    (row,) = fitting._aligning(asked, rehearsal.of(asked.plan))
    assert row["program"] == "aligning step, ESD esd-u emoji weapons"
    assert (row["batch"], row["dtype"], row["remat"]) == (2, "float32", False) and row["fits"] and row["compiles"]
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(asked.plan.pipeline.params["unet"]))
    assert row["parts"]["arguments"] > 3 * weights  # the frozen ones; what is trained, with its two moments
    assert row["flops"] > 0 and row["bytes"] >= rehearsal.of(asked.plan)[0].notes[0].held.fixed_bytes(None)


def test_a_step_that_cannot_fit_by_its_arguments_is_not_compiled():
    asked = question(Subject("one", "esd"))
    (found,) = rehearsal.of(asked.plan)
    short = asked._replace(target=asked.target._replace(memory=found.notes[0].held.fixed_bytes(None) - 1))
    (row,) = fitting._aligning(short, [found])
    assert not row["fits"] and row["bytes"] > row["limit_bytes"] and row["reason"] == "not compiled, as it cannot fit"
    assert "a smaller batch where the method has one" in row["remedy"]


def test_a_method_that_cannot_be_rehearsed_is_named_with_the_reason():
    own, many = Subject("own", "resalign"), Subject("many", "stereo", {"rounds": 0})
    found = rehearsal.of(question(own, many, Subject("uce", "uce"), Subject("c", "esd", checkpoint="weights")).plan)
    assert [(each.notes, each.refused) for each in found] == [
        ([], "resalign, which has a loop of its own"),
        ([], "stereo, which refuses (ValueError: STEREO: rounds=0, expected at least 1.)"),
    ]
