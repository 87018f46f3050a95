"""Profiles beyond the protocols': what a config must say about them, what their ids hash, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from spqr_jax import config as config_lib
from spqr_jax import mini, protocols
from spqr_jax.config import BFT, Config, Own, OwnEpochs, OwnRates, OwnSteps, Subject
from spqr_jax.run import adaptations, check, dry_run, identity, missing, names, protocol
from spqr_jax.run.bft import num_steps, training_options
from spqr_jax.run.cells import plan
from spqr_jax.run.identity import Inputs
from spqr_jax.submission.stated import config_of

FEW = {"pictures": "mini:panda", "instance": "a sks panda", "kind": "a panda", "initial": "panda"}


def config_with(*profiles: str, own: Own | None = None, **bft) -> Config:
    subjects = (Subject("No alignment"),)
    return protocol.resolve(Config(subjects=subjects, bft=BFT(profiles=profiles, own=own or Own(), **bft)))


def refused(says: str, *profiles: str, own: Own | None = None, **bft) -> None:
    with pytest.raises(ValueError, match=says):
        check.check(config_with(*profiles, own=own, **bft))


def test_an_unknown_profile_lists_the_known():
    refused(
        r"profiles: profile 'lora' is unknown; expected one of lite, moderate, standard, dora, lora_text, dreambooth, "
        r"textual_inversion, adapter:FILE",
        "lora",
    )
    refused(r"profile 'adapter:' is unknown", "adapter:")
    with pytest.raises(ValueError, match=r"profile 'lora' is unknown; expected one of lite"):
        dry_run.plan(config_with("lora"))  # which comes before the check


@pytest.mark.parametrize("profile", ["dora", "lora_text"])
def test_a_profile_of_ours_needs_its_length(profile):
    says = rf"'{profile}' is none of the protocol's.*bft.own.epochs.{profile}.*bft.own.steps.{profile}, steps of 16"
    refused(says, profile)
    check.check(config_with(profile, own=Own(epochs=OwnEpochs(**{profile: 1}))))


@pytest.mark.parametrize("profile", ["dreambooth", "textual_inversion"])
def test_few_pictures_need_steps_and_pictures(profile):
    with pytest.raises(ValueError, match=rf"set config.bft.own.steps.{profile}, steps of 16 images"):
        check.check(config_with(profile))
    refused(r"set config.bft.own.pictures, config.bft.own", profile, own=Own(OwnSteps(**{profile: 3})))
    check.check(config_with(profile, own=Own(OwnSteps(**{profile: 3}), **FEW)))


def test_dreambooth_has_halves():
    refused(r"batch_size=3 is odd", "dreambooth", own=Own(OwnSteps(dreambooth=3), **FEW), batch_size=3)
    refused(
        r"bft.own.class_pictures=0 is too small", "dreambooth", own=Own(OwnSteps(dreambooth=3), **FEW, class_pictures=0)
    )


def test_steps_and_rates():
    own = Own(OwnSteps(dreambooth=7), OwnEpochs(dora=1, lora_text=2), OwnRates(dreambooth=5e-6))
    config = config_with("lite", "dora", "lora_text", "dreambooth", "adapter:x", own=own)
    lite, dora, text, few, adapter = (num_steps(config.bft, p, 5000) for p in config.bft.profiles)
    assert (lite, dora, text, few, adapter) == (313, 313, 626, 7, 0)
    rates = [training_options(config, p, 7)["optimiser"].lr for p in ("dora", "dreambooth")]
    assert rates == [1e-4, 5e-6]
    with pytest.raises(ValueError, match="'dora' is unknown to the protocols"):
        protocols.training_steps("eccv-2026", "dora", 1)


def ids(config: Config, reads: dict[str, str], data: str = "data") -> dict[str, str]:
    inputs = Inputs("backbone", {}, {"general": data}, {}, adaptations=reads)
    return {cell.profile: cell.id for cell in plan(config, Path(), inputs)[1]}


def test_ids_change_with_what_decides_a_result_and_with_nothing_else():
    own = Own(OwnSteps(dreambooth=3, textual_inversion=4, dora=2), adapters={"x": "a/x"}, **FEW)
    profiles = ("lite", "dora", "dreambooth", "textual_inversion", "adapter:x")
    reads = {"dreambooth": "pandas", "textual_inversion": "pandas", "adapter:x": "0" * 64}
    config = config_with(*profiles, own=own)
    first = ids(config, reads)

    def changed(reads=reads, data="data", **fields) -> set[str]:
        other = config_with(*profiles, own=dataclasses.replace(own, **fields))
        return {profile for profile, id in ids(other, reads, data).items() if id != first[profile]}

    assert changed(adapters={"x": "moved/x"}) == changed(pictures="mini:owl") == set()
    assert changed(reads | {"adapter:x": "1" * 64}) == {"adapter:x"}
    assert changed(reads | {"dreambooth": "owls"}) == {"dreambooth"}
    assert changed(data="other") == {"lite", "dora"}
    assert changed(steps=OwnSteps(dreambooth=3, textual_inversion=4, dora=5)) == {"dora"}
    assert changed(kind="an owl") == changed(prior_weight=0.5) == {"dreambooth"}
    assert changed(word="<other>") == {"textual_inversion"}
    assert ids(config_with("lite"), {})["lite"] == first["lite"], "profiles of ours change no other cell"
    assert first["adapter:x"].startswith("no-alignment-adapter-x-general-42-")


def test_manifests_without_them_are_those_of_older_versions():
    plain = config_lib.as_dict(config_with("lite"))
    assert "own" not in plain["bft"]
    assert identity.as_dict(Inputs("b", {}, {}, {})).keys() == set(Inputs._fields) - {"adaptations", "probes"}
    assert "adaptations" in identity.as_dict(Inputs("b", {}, {}, {}, adaptations={"adapter:x": "0"}))
    config = config_with("dora", own=Own(OwnSteps(dora=3)))
    for one in (config, config_with("lite")):
        assert config_of({"config": json.loads(json.dumps(config_lib.as_dict(one)))}) == one


def test_a_run_with_them_departs_from_the_protocol_and_its_other_cells_do_not():
    own = Own(OwnSteps(dora=3))
    stated = protocol.statement(config_with("lite", "dora", own=own))
    assert stated.changed["bft.profiles"] == [["lite", "dora"], ["lite"]]
    assert "bft.profiles" in protocols.of_cell(stated, "dora").changed
    assert protocols.of_cell(stated, "lite") == protocols.of_cell(protocol.statement(config_with("lite")), "lite")


# --- files


def test_a_missing_adapter_and_missing_pictures_are_listed_with_the_other_missing_files(tmp_path):
    own = Own(OwnSteps(dreambooth=3), adapters={"x": str(tmp_path / "none")}, **FEW | {"pictures": "folder:nowhere"})
    with pytest.raises(missing.MissingFiles) as error:
        missing.open_all(config_with("adapter:x", "dreambooth", own=own))
    assert "bft.profiles[adapter:x]" in str(error.value) and "bft.own.pictures" in str(error.value)
    assert str(error.value).count("does not exist") == 2


@pytest.fixture(scope="module")
def world():
    return convert.load(mini.model_path())


def adapter(layer: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, columns), "lora_B": (rows, 2)}
    return {f"{layer}.{k}.weight": rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def test_an_adapter_of_another_family_is_refused_before_any_work(world, tmp_path):
    save_file(adapter("transformer.single_transformer_blocks.0.attn.to_q", 8, 8), tmp_path / "flux.safetensors")
    save_file(adapter("unet.mid_block.attentions.9.proj_in", 8, 8), tmp_path / "larger.safetensors")
    opened = missing.Opened(world, {}, {}, {}, {}, None, {}, None)
    for file, says in (("flux", "belongs to a FluxTransformer2DModel"), ("larger", "2 unexpected: unet.mid_block")):
        config = config_with(f"adapter:{tmp_path / file}.safetensors")
        with pytest.raises(ValueError, match=rf"config.bft.profiles: adapter:.*{says}"):
            adaptations.check(config, opened)
    unet = mini.model_path() / "unet"
    with pytest.raises(ValueError, match=r"is a UNet, expected a LoRA or DoRA"):
        adaptations.check(config_with(f"adapter:{unet}"), opened)


def test_words_that_cannot_be_learned_are_refused_before_any_work(world):
    config = config_with("textual_inversion", own=Own(OwnSteps(textual_inversion=1), **FEW))
    opened = missing.Opened(world, {}, {}, {}, {}, None, {}, names.few_pictures(config))
    adaptations.check(config, opened)
    for field, value, says in (("word", "panda", "is a token already"), ("initial", "sks panda", "of one token")):
        own = dataclasses.replace(config.bft.own, **{field: value})
        with pytest.raises(ValueError, match=rf"profiles: textual_inversion: .*{says}"):
            adaptations.check(config_with("textual_inversion", own=own), opened)


def test_pictures_of_the_emoji_world():
    with pytest.raises(ValueError, match=r"mini:unicorn, 5 pictures: expected one of dog face, .* at most 8 pictures"):
        names.few_pictures(config_with("lite", own=Own(pictures="mini:unicorn")))
    five = names.few_pictures(config_with("lite", own=Own(pictures="mini:panda")))
    assert len(five) == 5 and len({five.images(np.array([i])).tobytes() for i in range(5)}) == 5
