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


def test_tried_settings_differ_from_the_tables_as_their_names_say():
    config, table = mini_settings.get_config(), {s.name: s for s in table1_mini.get_config().subjects}
    check.check(config)
    assert config.seed == 1 and table1_mini.get_config().seed == 0  # so that no prompt is one that is scored
    assert config.subjects[0] == table["No alignment"]
    assert {s.name.split(":")[0] for s in config.subjects[1:]} == set(table) - {"No alignment"}
    for subject in config.subjects[1:]:
        base = table[subject.name.split(":")[0]]
        differing = [key for key, value in subject.options.items() if base.options.get(key) != value]
        assert subject.method == base.method and differing
        assert all(key in subject.name for key in differing)


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
    pipeline, concept = names_lib.backbone(table1_mini.get_config()), mini_lib.concept()
    for config in (table1_mini.get_config(), mini_settings.get_config()):
        subjects = [s for s in config.subjects if s.method == "sld"]
        assert subjects
        for subject in subjects:
            aligned = sld.align(pipeline, concept, **subject.options)
            assert attached.find(aligned, SLD).concept == table1_mini.UNSAFE
    for names in world.HARMFUL.values():
        assert sum(name in table1_mini.UNSAFE for name in names.values()) >= 3
