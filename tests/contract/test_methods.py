"""What every method keeps to, in one step on a small pipeline of every backbone. A new method adds a row to OPTIONS."""

import ast
import functools
import inspect
import pkgutil
import re
import sys

import jax
import numpy as np
import pytest

from spqr_jax import backbones, methods
from spqr_jax import params as params_lib
from spqr_jax.concepts import Concept
from spqr_jax.methods import METHODS, resalign
from spqr_jax.methods.base import check_result, fault
from tests.contract import small

CONCEPT = Concept("gun", ("gun",), preserve=("cat",), retain=("cat", "dog"), templates=("a {}",))
LEARNS = {"steps": 1, "sampling_steps": 2}
FROM_IMAGES = {**LEARNS, "images": 2}
IN_BATCHES = {**FROM_IMAGES, "batch_size": 1}
# The options with which a method does as little as it can.
OPTIONS = {
    "none": {},
    "uce": {},
    "rece": {"epochs": 1},
    "esd": LEARNS,
    "sld": {},
    "modular_lora": LEARNS,
    "mace": FROM_IMAGES,
    "spm": {**LEARNS, "eighths": (8,), "warmup": 0},
    "fmn": FROM_IMAGES,
    "salun": {**IN_BATCHES, "mask_steps": 1},
    "erasediff": IN_BATCHES,
    "scissorhands": {**IN_BATCHES, "prune_batches": 1},
    "stereo": {
        "rounds": 1,
        "erase_steps": 1,
        "attack_steps": 1,
        "final_steps": 1,
        "images": 2,
        "sampling_steps": 3,
        "image_steps": 2,
    },
    "advunlearn": {**LEARNS, "warmup": 0, "attack_steps": 1, "retain_batch_size": 1},
    "resalign": {
        **FROM_IMAGES,
        "retain_batch_size": 1,
        "tunings": (resalign.Tuning(1, 1e-4, "gd"),),
        "sampled": 1,
        "neumann": 1,
    },
    "safety_dpo": {**IN_BATCHES, "warmup": 0},
}
KEYS = [backbone.key for backbone in backbones.BACKBONES]
DEFINED = [
    (name, key)
    for name, method in METHODS.items()
    for key in KEYS
    if name in OPTIONS and (not method.backbones or key in method.backbones)
]
REFUSED = [(name, key) for name in METHODS for key in KEYS if METHODS[name].backbones and (name, key) not in DEFINED]


@functools.cache
def before(key):
    return small.quick(key)


@functools.cache
def kept(key):
    """A copy of all weights, taken before any method has seen them."""
    return jax.tree.map(np.array, before(key).params)


@functools.cache
def aligned(name, key):
    """The results of two calls with the same seed."""
    kept(key)
    return tuple(METHODS[name].align(before(key), CONCEPT, seed=3, **OPTIONS[name]) for _ in range(2))


def content(pipeline):
    """Everything of a pipeline that a method may change, as a tree."""
    return pipeline.params, [vars(attachment) for attachment in pipeline.attached]


def same(a, b) -> bool:
    """Whether two trees have the same leaves, bit by bit."""
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))


def test_every_method_has_its_options_here():
    assert list(OPTIONS) == list(METHODS)


def test_a_method_is_called_as_its_file_is():
    files = {module.name for module in pkgutil.iter_modules(methods.__path__)} - {"base", "tools"}
    assert set(METHODS) == files
    for name, method in METHODS.items():
        assert method.name == name and method.align is getattr(methods, name).align and method.source == ""
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_form_and_the_fields(name):
    method = METHODS[name]
    assert fault(method.align) == ""
    assert list(methods.defaults(method)) == list(methods.options(method)), "every option has a default"
    assert {"seed", "progress"} <= set(methods.options(method))
    assert set(method.backbones) <= set(KEYS)
    assert method.data_options == tuple(option for option in methods.options(method) if "pictures" in option)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented(name):
    """In a docstring of the method's file, or where the options that methods share are."""
    module = sys.modules[METHODS[name].align.__module__]
    nodes = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    text = "\n".join([module.__doc__, methods.__doc__, *(ast.get_docstring(node) or "" for node in nodes)])
    assert [option for option in methods.options(METHODS[name]) if not re.search(rf"\b{option}\b", text)] == []


@pytest.mark.parametrize(("name", "key"), DEFINED)
def test_one_step(name, key):
    given, (first, second) = before(key), aligned(name, key)
    assert same(content(first), content(second)), "the same seed, other weights"
    assert same(given.params, kept(key)) and given.attached == (), "the pipeline that was given has changed"
    check_result(METHODS[name], given, first)
    after = params_lib.flatten(first.params)
    assert all(after[path].dtype == weight.dtype for path, weight in params_lib.flatten(given.params).items())
    assert same(content(first), content(given)) == (name == "none"), "the method did nothing"


@pytest.mark.parametrize(("name", "key"), REFUSED)
def test_a_backbone_that_a_method_does_not_name_is_refused_with_both_names(name, key):
    backbone = next(backbone for backbone in backbones.BACKBONES if backbone.key == key)
    expected = (
        rf"{METHODS[name].title} is not defined for {backbone.name}, only for .*; choose another method, or another"
    )
    with pytest.raises(ValueError, match=expected):
        METHODS[name].align(before(key), CONCEPT, **OPTIONS[name])
