"""Methods and options that cannot work are refused before any work, each in one line with its remedy."""

import pytest

import convert
from spqr_jax import mini
from spqr_jax.config import Config, Generation, Subject
from spqr_jax.methods import METHODS
from spqr_jax.run import check, opening, protocol
from tests.contract import small
from tests.run.lab import ERASE

FORM = r"align\(pipeline, concept, \*, seed, \.\.\.\)"
HEAD = r"config\.subjects\[Mine\]: method 'my_lab\.erase'"


def config_of(method, **options):
    return Config(subjects=(Subject("Mine", method, options),))


def refused(says, method, **options):
    with pytest.raises(ValueError, match=says) as error:
        check.check(protocol.resolve(config_of(method, **options)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["esdd", "", "my_lab", "my-lab.erase", "my_lab:erase", ".erase", "my_lab..erase", "ESD"]
)
def test_an_unknown_method(name):
    refused(
        f"Mine.: method '{name}' is unknown; expected one of {', '.join(METHODS)}, or the dotted path of a func", name
    )


def test_a_dotted_path_that_is_nowhere():
    refused(
        rf"{HEAD} cannot be imported \(ModuleNotFoundError: No module named 'my_lab'\); set PYTHONPATH", "my_lab.erase"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", rf": my_lab has no 'erase'; write {FORM} there"),
        ("erase = 3", rf" is of type int; expected a function {FORM}, or a Method of one"),
        ("class erase: pass", r" is of type type; expected a function"),
        (
            "raise RuntimeError('no\\n licence')",
            r" cannot be imported \(RuntimeError: no licence\); correct",
        ),
        ("raise SystemExit(3)", r" cannot be imported \(SystemExit: 3\); correct that module"),
        ("def erase(:", r" cannot be imported \(SyntaxError: .*my_lab\.py, line 1\)\); correct that module"),
        ("import of_no_use", r" cannot be imported \(ModuleNotFoundError: .*\); install of_no_use"),
        ("def erase(*, seed): ...", rf" has not the form {FORM}: the parameter `pipeline` is missing"),
        ("def erase(pipeline, *, seed): ...", rf" has not the form {FORM}: the parameter `concept` is missing"),
        ("def erase(pipeline, concept): ...", r".*: the parameter `seed` is missing"),
        ("def erase(pipeline, concept, *, sead): ...", r".*: the parameter `seed` is missing"),
        ("def erase(pipeline, concept, seed=0): ...", r".*: the parameter `seed` must stand after \*"),
        ("def erase(pipeline, concept, strength, *, seed): ...", r".*: the parameter `strength` must stand after \*"),
        (
            "def erase(pipeline, concept, *, seed, **more): ...",
            r".*: it takes \*\*more, so options could not be",
        ),
        ("def erase(pipeline, concept, *more, seed): ...", r".*: it takes \*more; write a bare \* there"),
    ],
)
def test_something_else_at_a_dotted_path(lab, text, says):
    lab(text)
    refused(HEAD + says, "my_lab.erase")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("backbones=('SDXL',)", "backbones has 'SDXL'; expected some of sd, sdxl"),
        ("data_options=('photos',)", "data_options has 'photos'; expected some of seed, strength"),
    ],
)
def test_a_record_with_names_that_do_not_exist(lab, fields, says):
    record = f"from spqr_jax.methods import Method\nMETHOD = Method('mine', 'Mine', erase, {fields})\n"
    lab(ERASE + record)
    refused(f"method 'my_lab.METHOD': {says}", "my_lab.METHOD")


def test_options(lab):
    refused(
        r"config\.subjects\[Mine\]\.options='stepz' is unknown; expected one of seed, method, steps", "esd", stepz=3
    )
    refused(r"options\['pictures'\]=3 is no text; name a data source", "salun", pictures=3)
    lab()
    refused(
        r"config\.subjects\[Mine\]\.options='eta' is unknown; expected one of seed, strength", "my_lab.erase", eta=1
    )
    check.check(protocol.resolve(config_of("my_lab.erase", strength=1)))
    lab(ERASE.replace("=0.5", ", progress"))
    refused("options: 'strength' of method my_lab.erase has no default; set it", "my_lab.erase")
    check.check(protocol.resolve(config_of("my_lab.erase", strength=1)))


def test_a_backbone_that_the_method_is_not_defined_for():
    pipeline = small.quick("sdxl")
    opening.check_backbone(config_of("uce"), pipeline)
    says = r"subjects\[Mine\]: FMN is not defined for SDXL, only for Stable Diffusion 1\.x or 2\.x; choose another"
    with pytest.raises(ValueError, match=says):
        opening.check_backbone(config_of("fmn"), pipeline)
    opening.check_backbone(Config(subjects=(Subject("Mine", "fmn", checkpoint="somewhere"),)), pipeline)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scheduler": "flow_euler"}, "config.generation: scheduler flow_euler: .* is not of flow matching"),
        ({"max_sequence_length": 77}, "config.generation: max_sequence_length .* does not have"),
        ({"height": 13}, "config.generation: height and width must be positive multiples of"),
    ],
)
def test_sampling_that_the_backbone_does_not_take(changes, says):
    config = protocol.resolve(Config(generation=Generation(**changes)))
    with pytest.raises(ValueError, match=says):
        opening.check_sampling(config, convert.load(mini.model_path()))
