"""Divisions: closed where the protocol was followed and everything is pinned, else open with every reason."""

import json

import pytest

from spqr_jax.report import __main__ as report
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import division


@pytest.fixture(scope="module")
def followed(made):
    """The bundle as if its run had departed from its protocol in nothing."""
    read = bundle_lib.read(made / "bundle")
    manifest = read.manifest | {"protocol": read.manifest["protocol"] | {"changed": {}}}
    board = read.leaderboard | {"protocol": read.leaderboard["protocol"] | {"changed": {}}}
    return read._replace(manifest=manifest, leaderboard=board)


def test_a_protocol_followed_with_all_that_is_pinned_is_closed(followed):
    assert division.reasons(followed, division.pins_of(followed)) == []


def test_every_departure_and_every_missing_pin_is_a_reason(followed):
    reasons = division.reasons(followed, division.shipped())
    assert reasons == [
        "the benign prompts are not pinned for this protocol",
        "the harmful prompts are not pinned for this protocol",
        "the reference images are not pinned for this protocol",
        *(f"judge {name} is not pinned for this protocol" for name in ("clip_score", "features", "harm")),
    ]
    changed = {"bft.rank": [4, 8]}
    other = followed._replace(manifest=followed.manifest | {"protocol": {"name": "spqr-jax", "changed": changed}})
    assert division.reasons(other, division.pins_of(followed)) == ["bft.rank is 4, spqr-jax has 8"]


def test_another_judge_prompt_set_or_reference_is_named(followed):
    pins = json.loads(json.dumps(division.pins_of(followed)))
    pins["spqr-jax"]["judges"]["classifier"]["options"]["threshold"] = 0.7
    pins["spqr-jax"]["prompts"]["harmful"] = ["0" * 64]
    pins["spqr-jax"]["reference"] = ["1" * 64]
    found = followed.prompts["harmful"]["sha256"][:12]
    reasons = division.reasons(followed, pins)
    assert f"the harmful prompts have sha256 {found}, pinned are 000000000000" in reasons
    assert "judge harm is not the pinned one (options.threshold: 0.5, pinned 0.7)" in reasons
    assert any(reason.startswith("the reference images have sha256") for reason in reasons) and len(reasons) == 3


def test_where_a_judge_runs_is_not_pinned(followed):
    pins = division.pins_of(followed)
    judges = json.loads(json.dumps(followed.manifest["judges"]).replace("CPUExecution", "CUDAExecution"))
    assert division.reasons(followed._replace(manifest=followed.manifest | {"judges": judges}), pins) == []


def test_a_judge_from_outside_is_believed_in_the_open_division_alone(followed):
    judges = followed.manifest["judges"] | {"harm": {"judge": "mine", "sha256": "1"}}
    other = followed._replace(manifest=followed.manifest | {"judges": judges})
    assert division.reasons(other, division.pins_of(other)) == [
        "judge harm has a rule that is not known here, so its verdicts were believed"
    ]


def test_the_pins_of_a_bundle_are_what_verify_takes(made, tmp_path, capsys):
    assert report.main(["pins", str(made / "bundle")]) == 0
    (tmp_path / "pins.json").write_text(capsys.readouterr().out)
    assert report.main(["verify", str(made / "bundle"), "--pins", str(tmp_path / "pins.json")]) == 0
    out = capsys.readouterr().out
    assert "open because seed is 0, spqr-jax has 42" in out and "pinned" not in out
    (tmp_path / "pins.json").write_text("[]")
    assert report.main(["verify", str(made / "bundle"), "--pins", str(tmp_path / "pins.json")]) == 1


def test_the_shipped_pins_are_those_of_the_judges_as_installed():
    from judges.nudenet import NudeNet
    from judges.nudenet_v2 import NudeNetV2

    pins = division.shipped()
    for name, judge in (("spqr-jax", NudeNet), ("eccv-2026", NudeNetV2), ("arxiv-2511", NudeNetV2)):
        identity = judge.open().identity
        pinned = pins[name]["judges"][identity["judge"]]
        assert {key: identity[key] for key in pinned} == pinned
