"""Configs of the emoji world that tests do not run: their settings are the ones that their texts name."""

import pytest

from configs import attacks_mini, mini, mini_settings, probes_mini, table1_mini
from spqr_jax import mini as mini_lib
from spqr_jax.config import Subject
from spqr_jax.methods import METHODS, options, sld
from spqr_jax.mini import probes, world
from spqr_jax.run import check, protocol
from spqr_jax.run import names as names_lib
from spqr_jax.sampling import attached
from spqr_jax.sampling.attached.safe_guidance import SLD


def test_settings_are_looked_at_on_a_concept_that_no_run_scores():
    looked, table = (protocol.resolve(config.get_config()) for config in (mini_settings, table1_mini))
    check.check(looked)
    assert [s.name for s in looked.subjects] == [s.name for s in table.subjects]
    differing = [a.name for a, b in zip(looked.subjects, table.subjects, strict=True) if a.options != b.options]
    assert differing == ["SLD"]  # its text
    texts = [{p.prompt for p in names_lib.prompts(config, "harmful")} for config in (looked, table)]
    assert len(texts[0]) == 200 and not texts[0] & texts[1]


def test_attacked_subjects_are_the_tables():
    config, table = attacks_mini.get_config(), table1_mini.get_config().subjects
    check.check(protocol.resolve(config))
    assert tuple(s.name for s in config.subjects) == ("No alignment", "AdvUnlearn", "STEREO", "ESD", "UCE")
    assert all(subject in table for subject in config.subjects)
    assert {attack.prompts for attack in config.attacks} == {attacks_mini.PROMPTS}
    assert [attack.name for attack in config.attacks if attack.transfer] == ["Ring-A-Bell"]


def test_probes_ask_every_set_of_the_world():
    config = probes_mini.get_config()
    check.check(protocol.resolve(config))
    assert config.subjects == mini.get_config().subjects
    assert {probe.prompts for probe in config.probes} == {f"mini:{kind}" for kind in probes.SETS}
    for probe in config.probes:
        assert len(names_lib.probe_prompts(config, probe)) == 100
        assert (probe.role == "harmful") == (probe.name in ("Named", "Implicit"))


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_option_is_refused_when_the_run_starts(name):
    config = table1_mini.get_config()
    config.subjects = (Subject("Mine", name, {"stepz": 3}),)
    with pytest.raises(
        ValueError, match=r"subjects\[Mine\]\.options='stepz' is unknown; expected one of seed.*progress"
    ):
        check.check(config)
    assert "pipeline" not in options(METHODS[name]) and (name != "spm" or "anchoring" in options(METHODS[name]))


def test_what_sld_guides_away_from_is_read_whole():
    """The emoji world's encoder reads 32 tokens; what lies beyond would be cut off without a word."""
    pipeline = names_lib.backbone(table1_mini.get_config())
    for category, words in world.HARMFUL.items():
        (subject,) = (s for s in table1_mini.get_config(category).subjects if s.method == "sld")
        aligned = sld.align(pipeline, mini_lib.concept(category), **subject.options)
        assert attached.find(aligned, SLD).concept == " ".join(words.values())
