"""A method of a user's own, named by its dotted path: found, run through the stage align, and identified."""

import hashlib
import re

import numpy as np
import pytest

from spqr_jax import methods
from spqr_jax import params as params_lib
from spqr_jax.config import Config, Subject
from spqr_jax.run import check, identity, protocol
from spqr_jax.run.cells import plan
from spqr_jax.run.identity import Inputs
from spqr_jax.run.stages import align
from spqr_jax.run.stages.state import Run
from tests.contract import small
from tests.run.lab import ERASE

RECORD = """
from spqr_jax.methods import Method

def erase(pipeline, concept, *, seed, photos=""):
    return pipeline

METHOD = Method("mine", "Our Erasure", erase, backbones=("sdxl",), data_options=("photos",))
"""


def run_of(method, folder, options=None):
    """An opened run on a small backbone with one subject of this method."""
    config = protocol.resolve(Config(subjects=(Subject("Mine", method, options or {}),)))
    check.check(config)
    inputs = Inputs("backbone", {}, {"general": "data"}, {}, methods=identity.method_sources(config.subjects))
    subjects, cells = plan(config, folder, inputs)
    return Run(config, folder, small.quick("sd"), None, {}, inputs, subjects, cells)


def test_the_stage_align_carries_it_out(lab, tmp_path):
    lab()
    run = run_of("my_lab.erase", tmp_path / "run", {"strength": 0.25})
    assert align.align(run, None) == []
    found = align.load_subject(run, run.subjects[0])
    before, after = (params_lib.flatten(p.params) for p in (run.backbone, found))
    for path, weight in before.items():
        np.testing.assert_array_equal(after[path], weight * (0.25 if path.startswith("unet.") else 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("return None", "ValueError: method my_lab.erase returned NoneType, expected a Pipeline."),
        (
            "return pipeline._replace(params={'unet': {}})",
            "returned the components unet, expected text_encoder, unet, va",
        ),
        (
            "return pipeline.with_params(vae={'more': pipeline.params['unet']})",
            r"returned vae\.more\.\S+ of shape \(.*\), expected nothing",
        ),
        (
            "return pipeline.with_params(unet={**pipeline.params['unet'], 'conv_in': {name: leaf * float('nan') "
            "for name, leaf in pipeline.params['unet']['conv_in'].items()}})",
            r"returned unet\.conv_in\.\w+ with values that are not finite",
        ),
    ],
)
def test_what_it_returns_must_be_a_pipeline_of_the_same_kind(lab, tmp_path, text, says):
    lab(f"def erase(pipeline, concept, *, seed):\n    {text}\n")
    failures = align.align(run_of("my_lab.erase", tmp_path / "run"), None)
    assert [failure.what for failure in failures] == ["align: Mine"]
    assert re.search(says, failures[0].error)


def test_its_file_is_its_identity(lab, tmp_path):
    def ids(method):
        run = run_of(method, tmp_path)
        return run.subjects[0].weights.name, run.cells[0].id, run.inputs.methods

    path = lab()
    first = ids("my_lab.erase")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first[2] == {"my_lab.erase": f"my_lab.erase sha256:{sha256}"}  # goes into the manifest
    assert ids("my_lab.erase") == first
    lab(ERASE + "\n# another version\n")
    second = ids("my_lab.erase")
    assert second[0] != first[0] and second[1] != first[1]
    lab()
    assert ids("my_lab.erase") == first
    lab(ERASE.replace("erase", "remove"))
    assert ids("my_lab.remove")[0] not in (first[0], second[0])


def test_the_code_in_memory_counts_and_not_a_file_that_changed_since(lab):
    path = lab()
    before = methods.find("my_lab.erase")
    path.write_text(ERASE + "\n# not imported\n")
    assert methods.find("my_lab.erase") == before


def test_two_files_that_make_one_method_both_count(lab):
    """The file that is named only passes the function on."""
    lab("from my_lab.inner import erase", "my_lab/__init__")
    lab(ERASE, "my_lab/inner")
    first = methods.find("my_lab.erase")
    lab(ERASE + "# changed\n", "my_lab/inner")
    second = methods.find("my_lab.erase")
    lab("from my_lab.inner import erase  # changed", "my_lab/__init__")
    assert len({first.source, second.source, methods.find("my_lab.erase").source}) == 3


def test_a_module_may_be_named_for_its_align_or_its_record(lab):
    lab(ERASE.replace("def erase", "def align"), "my_lab/erase")
    by_module, by_function = methods.find("my_lab.erase"), methods.find("my_lab.erase.align")
    assert by_module == by_function and by_module.name == "my_lab.erase.align"
    assert methods.options(by_module) == ("seed", "strength") and methods.defaults(by_module) == {"strength": 0.5}
    assert by_module.backbones == () and by_module.data_options == ()


def test_a_record_says_more_than_a_function(lab):
    lab(RECORD)
    for path in ("my_lab.METHOD", "my_lab.erase"):  # the function too: its photos must not be known by path alone
        method = methods.find(path)
        assert method.name == path and method.title == "Our Erasure"
        assert method.backbones == ("sdxl",) and method.data_options == ("photos",)
    lab(ERASE.replace("strength=0.5", "pictures=''"))
    assert methods.find("my_lab.erase").data_options == ("pictures",)
