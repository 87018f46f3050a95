"""Protocols: what they say, how a config follows one, and how departures are stated."""

import dataclasses

import pytest

from configs import general, lora_rank, mini, paper, prompts
from spqr_jax import finetune, protocols
from spqr_jax import prompts as prompts_lib
from spqr_jax.config import BFT, Config, Judges, PerProfile, Prompts
from spqr_jax.protocols import PROTOCOLS
from spqr_jax.run import check, dry_run, protocol
from spqr_jax.run.bft import num_steps


def resolved(config, name=None):
    return protocol.resolve(dataclasses.replace(config, protocol=name) if name else config)


@pytest.mark.parametrize(
    ("profile", "epochs", "steps"),
    [("lite", 1, 313), ("lite", 3, 939), ("moderate", 3, 939), ("standard", 10, 3130), ("standard", 0, 0)],
)
def test_steps_of_the_official_curriculum(profile, epochs, steps):
    assert protocols.training_steps("eccv-2026", profile, epochs) == steps
    assert protocols.training_steps(PROTOCOLS["arxiv-2511"], profile, epochs) == steps


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("profile", protocols.PROFILES)
def test_a_protocols_steps_are_those_that_a_run_takes(name, profile):
    config = resolved(general.get_config(), name)
    assert num_steps(config.bft, profile, config.bft.samples) == protocols.training_steps(name, profile)
    assert getattr(config.bft.epochs, profile) == finetune.EPOCHS[profile]


def test_bad_arguments_of_training_steps():
    with pytest.raises(ValueError, match=r"'eccv' is unknown; expected one of eccv-2026, arxiv-2511, spqr-jax"):
        protocols.training_steps("eccv", "lite", 1)
    with pytest.raises(ValueError, match=r"profile 'full' is unknown"):
        protocols.training_steps("eccv-2026", "full", 1)
    with pytest.raises(ValueError, match=r"must not be negative, found -1"):
        protocols.training_steps("eccv-2026", "lite", -1)


def test_protocols_are_immutable():
    one = PROTOCOLS["eccv-2026"]
    with pytest.raises(AttributeError):
        one.name = "mine"
    with pytest.raises(TypeError):
        PROTOCOLS["mine"] = one
    with pytest.raises(TypeError):
        one.prompts.sets["visu"] = None
    assert set(one.prompts.sets) == {"visu", "i2p", "rab"} < set(prompts_lib.KINDS)


def test_the_experiments_follow_the_second_edition():
    for config in (general.get_config(), prompts.get_config("i2p"), prompts.get_config("rab")):
        stated = protocol.statement(resolved(config))
        assert stated.label == "eccv-2026" and stated.changed == {}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_one_flag_takes_another_protocol(name):
    config = resolved(general.get_config(), name)
    assert protocol.statement(config).label == name
    assert config.bft.dropout == (0.1 if name == "arxiv-2511" else 0.0)
    assert config.bft.order == ("shuffled" if name == "spqr-jax" else "file")
    assert resolved(config) == config, "resolving again changes nothing"
    check.check(config)


def test_harmful_prompts_are_those_of_the_erased_concept():
    visu, i2p, rab = (resolved(prompts.get_config(kind)).prompts for kind in ("visu", "i2p", "rab"))
    assert visu.harmful.endswith("visu.json?tag=sexual,nudity") and visu.n_harmful == 500
    assert i2p.harmful.endswith("i2p.csv?nudity_percentage>=10") and i2p.n_harmful == 100
    assert rab.harmful.endswith("rab.csv") and rab.n_harmful == 100
    assert not any(one.own_guidance for one in (visu, i2p, rab))


def test_departures_are_named_with_both_values():
    config = general.get_config()
    config.bft.dropout, config.bft.epochs.standard, config.prompts.n_harmful = 0.1, 20, 100
    config.score.weights = (2, 1, 1, 1)
    stated = protocol.statement(resolved(config))
    assert stated.changed == {
        "bft.dropout": [0.1, 0.0],
        "bft.epochs.standard": [20, 10],
        "prompts.n_harmful": [100, 500],
        "score.weights": [[2, 1, 1, 1], [1.0, 1.0, 1.0, 1.0]],
    }
    assert stated.label == "eccv-2026, changed: bft.dropout, bft.epochs.standard, prompts.n_harmful, score.weights"
    assert set(protocols.of_cell(stated, "lite").changed) == {"bft.dropout", "prompts.n_harmful"}
    assert set(protocols.of_cell(stated, "standard").changed) == {
        "bft.dropout",
        "bft.epochs.standard",
        "prompts.n_harmful",
    }


def test_setting_a_field_to_the_protocols_value_is_no_departure():
    config = general.get_config()
    config.bft.curriculum, config.score.weights, config.bft.rank = [1000, 3000, 5000], [1, 1, 1, 1], 8
    assert protocol.statement(resolved(config)).changed == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompts": Prompts(harmful="my.csv")}, "prompts.harmful"),
        ({"prompts": Prompts(harmful="visu:a.json?tag=violence")}, "prompts.harmful"),
        ({"prompts": Prompts(harmful="visu:a.json", images=2)}, "prompts.images"),
        ({"judges": Judges(safety={"n": "nudenet", "q": "q16:X", "l": "llavaguard:X"})}, "judges.safety"),
        ({"judges": Judges(safety={"n": "nudenet:strict5", "l": "llavaguard:X"})}, "judges.safety"),
        (
            {"judges": Judges(safety={"n": "nudenet", "l": "llavaguard:X"}, features="f.onnx?mode=clean-fid")},
            "features",
        ),
        ({"bft": BFT(steps=PerProfile(standard=7))}, "bft.steps.standard"),
        ({"concept": "violence"}, "concept"),
        ({"seed": 1}, "seed"),
    ],
)
def test_any_departure_is_seen(change, field):
    config = resolved(dataclasses.replace(general.get_config(), **change))
    assert any(name.endswith(field) for name in protocol.statement(config).changed)


def test_judges_are_the_variants_of_the_protocol():
    safety = {"n": "nudenet", "l": "llavaguard:some/where"}
    names = {name: resolved(Config(judges=Judges(safety=safety)), name).judges.safety for name in PROTOCOLS}
    assert names["eccv-2026"]["n"] == "nudenet:v2" and names["spqr-jax"]["n"] == "nudenet:strict5"
    assert names["eccv-2026"]["l"].startswith("llavaguard:some/where?policy=")
    assert "mode=generate" in names["eccv-2026"]["l"] and "mode=prefill" in names["spqr-jax"]["l"]


def test_the_rank_of_table_e_is_stated():
    assert protocol.statement(resolved(lora_rank.get_config("sd15-4"))).label == "eccv-2026, changed: bft.rank"
    assert protocol.statement(resolved(lora_rank.get_config("sd15-8"))).label == "eccv-2026"


def test_the_emoji_world_says_what_it_changes():
    changed = protocol.statement(resolved(mini.get_config())).changed
    assert {"bft.samples", "bft.curriculum", "prompts.harmful", "judges.safety", "generation.steps"} <= set(changed)
    assert not {field for field in changed if field.startswith("bft.")} - {"bft.samples", "bft.curriculum"}


def test_a_dry_run_states_protocol_and_steps_before_anything_is_opened():
    for epochs, steps in ((1, "313"), (3, "939"), (10, "3,130")):
        config = general.get_config()
        config.bft.epochs.standard = epochs
        text = dry_run.plan(resolved(config))
        assert f"standard: {steps} steps ({epochs} pass" in text and text.startswith("Protocol: eccv-2026")
    assert "500 harmful of visu:" in text and paper.at("prompts/visu.json") in text
    assert "bft.epochs.standard: 3, the protocol has 10" in dry_run.plan(
        resolved(dataclasses.replace(config, bft=BFT(epochs=PerProfile(1, 3, 3))))
    )


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match=r"config.protocol='eccv' is unknown; expected one of eccv-2026"):
        protocol.resolve(Config(protocol="eccv"))


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ({"cohort": ("Nobody",)}, r"score.cohort='Nobody' is unknown; expected one of .*UCE"),
        ({"ceiling": "1.2"}, r"score.ceiling='1.2': expected a cosine"),
        ({"ceiling": "Nobody"}, r"score.ceiling='Nobody': expected a cosine.*No alignment"),
        ({"headline": "linear"}, r"score.headline='linear' is unknown"),
    ],
)
def test_rules_of_the_score_are_checked_before_a_run(score, says):
    config = resolved(mini.get_config())
    for name, value in score.items():
        setattr(config.score, name, value)
    with pytest.raises(ValueError, match=says):
        check.check(config)
