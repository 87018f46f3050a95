"""What every method keeps to, by the checks that `python -m spqr_jax.methods check` makes of a method of yours."""

import functools
import pkgutil
import re

import jax
import numpy as np
import pytest

from spqr_jax import backbones, methods
from spqr_jax.methods import METHODS, Method
from spqr_jax.methods.base import fault
from spqr_jax.methods.contract import check, checks, smallest, tiny
from spqr_jax.methods.contract.checks import REFUSES, RUNS
from tests.contract import small

KEYS = [backbone.key for backbone in backbones.BACKBONES]
# A method that takes long is tried on its first backbone, and on the others by the slow tests.
LONG = [("safety_dpo", key) for key in KEYS[1:]]
CASES = [
    pytest.param(name, key, marks=pytest.mark.slow) if (name, key) in LONG else (name, key)
    for name in METHODS
    for key in KEYS
]
# Where a backbone takes another variant than the default.
GIVEN = {("uce", key): {"variant": "v2"} for key in ("sd3", "flux")}


def faults(findings):
    """what -> fault, for the checks that fail."""
    return {finding.check: finding.fault for finding in findings if finding.fault}


@functools.cache
def quick(key):
    return small.quick(key)


def test_every_backbone_has_a_tiny_pipeline():
    assert list(tiny.COMPONENTS) == KEYS


def test_a_method_is_called_as_its_file_is():
    files = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    assert set(METHODS) == files - {"__main__", "base", "contract", "tools"}
    for name, method in METHODS.items():
        assert method.name == name and method.align is getattr(methods, name).align and method.source == ""
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_form_and_the_fields(name):
    method = METHODS[name]
    assert faults(checks.of_form(method)) == {}
    assert {"seed", "progress"} <= set(methods.defaults(method))
    assert set(method.backbones) <= set(KEYS)
    assert method.data_options == tuple(option for option in methods.options(method) if "pictures" in option)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_one_step(name, key):
    findings = list(checks.of_backbone(METHODS[name], quick(key), GIVEN.get((name, key))))
    assert faults(findings) == {}
    refused = bool(METHODS[name].backbones) and key not in METHODS[name].backbones
    assert findings[0].check == (REFUSES if refused else RUNS)
    if refused:
        backbone = next(backbone for backbone in backbones.BACKBONES if backbone.key == key)
        expected = f"{METHODS[name].title} is not defined for {backbone.name}, only for "
        assert findings[0].note.startswith(expected) and "; choose another method, or another" in findings[0].note


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_one_step_on_the_models_that_the_command_uses(name):
    assert faults(check(METHODS[name])) == {}


def test_the_smallest_options_are_those_that_cost():
    assert smallest.options(METHODS["esd"]) == {"steps": 1, "sampling_steps": 3}
    assert smallest.options(METHODS["esd"], {"steps": 2, "eta": 3.0}) == {"steps": 2, "sampling_steps": 3, "eta": 3.0}
    assert smallest.options(METHODS["uce"]) == {}


# --- methods that break the contract: each is found by the check that is named


def of_unet(change):
    """A method that changes every weight of the UNet."""

    def align(pipeline, concept, *, seed):
        """`seed` is not used."""
        unet = jax.tree.map(lambda leaf: change(leaf, seed), pipeline.params["unet"])
        return pipeline.with_params(unet=unet)

    return align


def in_place(leaf, seed):
    leaf *= np.float32(2)
    return leaf


def refused_late(pipeline, concept, *, seed):
    raise KeyError("down_blocks")


def into_configs(pipeline, concept, *, seed):
    kept = {name: dict(config) for name, config in pipeline.configs.items()}
    pipeline.configs["unet"]["sample_size"] = 8
    return pipeline._replace(configs=kept)


def taking_out(pipeline, concept, *, seed):
    kept = dict(pipeline.params)
    del pipeline.params["text_encoder"]["text_model"]
    return pipeline._replace(params=kept | {"text_encoder": small.quick("sd").params["text_encoder"]})


def other_configs(pipeline, concept, *, seed):
    return pipeline._replace(configs={**pipeline.configs, "scheduler": {}})


def fewer_weights(pipeline, concept, *, seed):
    return pipeline.with_params(text_encoder={})


def own_attachment(pipeline, concept, *, seed):
    return pipeline._replace(attached=(object(),))


def any_option(*arguments, **options):
    return of_unet(lambda leaf, seed: leaf * 2)(*arguments, seed=options["seed"])


any_option.__wrapped__ = refused_late  # as functools.wraps leaves it: the signature is that of another function
DRAWN = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("align", "what", "says"),
    [
        (of_unet(lambda leaf, seed: leaf + DRAWN.random(dtype=np.float32)), "same seed", "params|unet|conv_in"),
        (of_unet(in_place), "as it is", "of the given pipeline has changed"),
        (of_unet(lambda leaf, seed: leaf.astype(np.float16)), "dtypes", "is float16, it was float32"),
        (of_unet(lambda leaf, seed: leaf * np.float32("nan")), "finite", "unet"),
        (of_unet(lambda leaf, seed: leaf), "changes something", "no weight has changed"),
        (of_unet(lambda leaf, seed: leaf[None]), "shapes", "expected"),
        (lambda pipeline, concept, *, seed: None, "shapes", "returned NoneType"),
        (fewer_weights, "shapes", "expected"),
        (into_configs, "as it is", "configs of the given pipeline has changed"),
        (taking_out, "as it is", "text_encoder.* of the given pipeline has changed"),
        (other_configs, "shapes", "other configs, which would be lost"),
        (own_attachment, "shapes", "attached a object, which would be lost"),
        (refused_late, "it runs", "KeyError: 'down_blocks' .*test_methods.py:"),
        (any_option, "unknown option", "it took the option no_such_option"),
    ],
)
def test_a_broken_method_is_found(align, what, says):
    found = faults(checks.of_backbone(Method("mine", "Mine", align), quick("sd")))
    assert any(what in check and re.search(says, fault) for check, fault in found.items()), found


def test_a_seed_without_effect_must_be_said():
    def align(pipeline, concept, *, seed):
        return pipeline.with_params(unet=jax.tree.map(lambda leaf: leaf * 2, pipeline.params["unet"]))

    silent = Method("mine", "Mine", align)
    found = checks._seed_matters(silent, checks._tried(silent, quick("sd"), {}))
    assert found[0] == ""  # this file has a docstring that says it
    exec("def plain(pipeline, concept, *, seed):\n    return pipeline", names := {})
    silent = silent._replace(align=names["plain"])
    assert "another seed gives the same" in checks._seed_matters(silent, checks._tried(silent, quick("sd"), {}))[0]


def test_a_backbone_that_is_not_refused_by_the_function_itself_is_found():
    method = Method("mine", "Mine", of_unet(lambda leaf, seed: leaf * 2), backbones=("sdxl",))
    assert "aligned Stable Diffusion" in faults(checks.of_backbone(method, quick("sd")))[REFUSES]


def test_a_method_that_runs_nowhere_is_found():
    def align(pipeline, concept, *, seed):
        raise ValueError(f"not on {backbones.of(pipeline).name}")

    found = faults(check(Method("mine", "Mine", align), make=quick))
    assert list(found) == ["it runs on a backbone at least"]


def test_options_are_named_and_have_defaults():
    def align(pipeline, concept, *, seed, progress, undescribed_one):
        return pipeline

    found = faults(checks.of_form(Method("mine", "Mine", align)))
    assert found["every option has a default"] == "none: undescribed_one"
    assert found["every option is named in a docstring"] == "not named: undescribed_one"

    def open_ended(pipeline, concept, *, seed, **options):
        return pipeline

    assert "**options" in fault(open_ended)
    assert next(iter(faults(check(Method("mine", "Mine", open_ended), make=quick)).values())) == fault(open_ended)
