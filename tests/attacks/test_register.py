"""What is true of every attack: its record, its arguments, and that all of them check before they work."""

import inspect

import pytest

import convert
from spqr_jax import attacks
from spqr_jax.attacks.base import ACCESS, Found, best, together
from spqr_jax.concepts import Concept
from spqr_jax.methods.contract import tiny
from tests import stand_in

NAMES = list(attacks.ATTACKS)
COUNTS = (
    "steps",
    "generations",
    "images",
    "population",
    "candidates",
    "times",
    "rounds",
    "restarts",
    "every",
    "length",
)


def test_the_names_are_those_of_files():
    assert NAMES == ["unlearndiffatk", "p4d", "ring_a_bell", "mma", "inversion", "latent_inversion"]
    with pytest.raises(ValueError, match="attack 'magic' is unknown; expected one of unlearndiffatk, p4d"):
        attacks.find("magic")


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_has_the_arguments_of_all_and_options_with_defaults(name):
    one = attacks.find(name)
    parameters = inspect.signature(one.attack).parameters
    assert list(parameters)[:5] == ["pipeline", "prompts", "concept", "seed", "target"]
    assert one.name == name and one.title and one.access in ACCESS and one.backbones
    assert {"seed", "target", "progress"}.isdisjoint(attacks.options(one)) and "progress" in parameters
    assert set(attacks.defaults(one)) == set(attacks.options(one))
    assert all(default is not inspect.Parameter.empty for default in attacks.defaults(one).values())
    documented = inspect.getdoc(one.attack) + inspect.getdoc(attacks)
    plain = {"image_steps", "image_guidance", "lr", "batch_size", "weight_decay"}
    assert not [option for option in attacks.options(one) if option not in documented and option not in plain]


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_zero_is_refused_before_any_work(name, monkeypatch):
    """For every option that counts something; nothing may be drawn or compiled until then."""
    one, pipeline = attacks.find(name), tiny.pipeline("sd")
    monkeypatch.setattr("spqr_jax.generate.sample", lambda *_: pytest.fail("something was drawn"))
    given = {"seed": 0, "target": pipeline}
    counted = [option for option in attacks.options(one) if option in COUNTS]
    assert counted
    for option in counted:
        with pytest.raises(ValueError, match=rf"^{one.title}: {option}=0, expected at least [12]"):
            one.attack(pipeline, ["a bomb"], Concept("bomb", ("bomb",)), **given, **{option: 0})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["sdxl", *(pytest.param(key, marks=pytest.mark.slow) for key in ("sd3", "flux"))])
def test_a_backbone_that_it_is_not_defined_for_is_refused(name, key):
    one, other = attacks.find(name), tiny.pipeline(key)
    with pytest.raises(ValueError, match=f"^{one.title} is not defined for .*, only for Stable Diffusion"):
        one.attack(other, ["a bomb"], Concept("bomb", ("bomb",)), seed=0, target=other)


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_under_attack_is_not_changed(name, reference):
    """Its weights and its tokenizer, by the smallest budget."""
    pipeline = convert.load(reference("sd1")[1])
    if attacks.find(name).access == "white-box":
        pipeline = stand_in.pipeline(pipeline)
    one, least = attacks.find(name), {"times": 1, "steps": 1, "generations": 1, "population": 2, "images": 1}
    least |= {"batch_size": 1, "image_steps": 1, "length": 2, "candidates": 2, "rounds": 1}
    options = {option: value for option, value in least.items() if option in attacks.options(one)}
    before = stand_in.vector(pipeline.params["unet"]).copy(), stand_in.vector(pipeline.params["text_encoder"]).copy()
    tokens = len(pipeline.tokenizers["tokenizer"])
    found = one.attack(pipeline, ["a cat"], Concept("cat", ("cat",)), seed=0, target=pipeline, **options)
    after = stand_in.vector(pipeline.params["unet"]), stand_in.vector(pipeline.params["text_encoder"])
    assert all((old == new).all() for old, new in zip(before, after, strict=True))
    assert tokens == len(pipeline.tokenizers["tokenizer"])
    assert len(found.prompts) == len(found.loss) == 1 and found.queries > 0


def test_the_least_finite_loss_wins_and_none_is_a_failure():
    nan, inf = float("nan"), float("inf")
    assert best("given", ["a", "b", "c"], [nan, 2.0, 1.0], 7) == Found("c", 1.0, 7)
    text, loss, queries = best("given", ["a", "b"], [nan, inf], 7)
    assert (text, queries) == ("given", 7) and loss != loss
    found = together([Found("a", 1.0, 7), Found("given", nan, 5)])
    assert found.prompts == ("a", "given") and found.queries == 12 and str(found.loss) == "[ 1. nan]"
