"""What a run keeps on disk: checkpoints, pictures, records and the ids of cells."""

import copy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import mini, mini_full
from spqr_jax import cells, checkpoint, config, images, records


def test_checkpoint_keeps_names_dtypes_and_values(tmp_path):
    tree = {"a": {"0": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "1": {"bias": jnp.ones(2, jnp.bfloat16)}}}
    checkpoint.save(tmp_path / "x", tree)
    checkpoint.save(tmp_path / "x", tree)  # replaces
    loaded = checkpoint.load(tmp_path / "x")
    assert set(loaded["a"]) == {"0", "1"}
    np.testing.assert_array_equal(loaded["a"]["0"]["kernel"], tree["a"]["0"]["kernel"])
    assert loaded["a"]["1"]["bias"].dtype == jnp.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_damaged_checkpoint_is_named(tmp_path):
    checkpoint.save(tmp_path / "x", {"a": jnp.ones(3)})
    for file in (tmp_path / "x").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="x is damaged"):
        checkpoint.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load(tmp_path / "nothing")


def test_picture_round_trip_and_damage(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images.write(tmp_path / "p.png", picture)
    np.testing.assert_array_equal(images.read([tmp_path / "p.png"])[0], picture)
    (tmp_path / "p.png").write_bytes((tmp_path / "p.png").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"p\.png"):
        images.read([tmp_path / "p.png"])


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "x" * 300, "<script>", "a\0b"])
def test_file_names_stay_in_their_directory(tmp_path, name):
    path = tmp_path / images.file_name(name, 0)
    assert path.resolve().parent == tmp_path.resolve()
    path.touch()


def test_damaged_records_are_named(tmp_path):
    (tmp_path / "records.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"records\.parquet is damaged"):
        records.read(tmp_path / "records.parquet")


def ids(c: config.Config, **files) -> list[str]:
    """Ids of the cells; `files`: what differs in the content of the files that the config names."""
    prompts = {"harmful": f"{c.prompts.n_harmful} harmful", "benign": f"{c.prompts.n_benign} benign"}
    inputs = cells.Inputs(
        "sha", prompts, {name: name for name in c.bft.scenarios}, {"": "", "safe.pt": "sha of safe.pt"}
    )
    return [cell.id for cell in cells.plan(c, Path("w"), inputs._replace(**files))[1]]


def test_ids_change_with_what_determines_the_result_and_with_nothing_else():
    base = mini.get_config()
    assert len(set(ids(base))) == 12
    same = copy.deepcopy(base)
    same.generation.batch_size = 7
    same.score.replicates = 500
    same.judges.max_undecided = 0.5
    same.bft.remat, same.bft.accumulate, same.bft.checkpoint_every = True, 2, 7
    assert ids(same) == ids(base)
    for change in (
        lambda c: setattr(c.bft, "lr", 2e-4),
        lambda c: setattr(c.bft, "rank", 4),
        lambda c: setattr(c.generation, "steps", 9),
        lambda c: setattr(c.prompts, "n_benign", 99),
        lambda c: setattr(c, "seed", 1),
        lambda c: setattr(c, "dtype", "bfloat16"),
    ):
        other = copy.deepcopy(base)
        change(other)
        assert not set(ids(other)) & set(ids(base))
    for files in (
        {"backbone": "another"},
        {"prompts": {"harmful": "another", "benign": "100 benign"}},
        {"data": {"general": "another"}},
    ):
        assert not set(ids(base, **files)) & set(ids(base))
    base.subjects[0].checkpoint = "safe.pt"
    assert len(set(ids(base, checkpoints={"safe.pt": "another"})) & set(ids(base))) == 9
    base.subjects[0].checkpoint = ""
    other = copy.deepcopy(base)
    other.bft.steps.standard += 1
    assert len(set(ids(other)) & set(ids(base))) == 8  # the other two profiles stay


def test_the_full_config_covers_every_scenario_with_several_seeds():
    assert len(set(ids(mini_full.get_config()))) == 4 * 3 * 7 * 3
    config.check(mini_full.get_config())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: setattr(c, "subjects", ()), "subjects is empty"),
        (lambda c: setattr(c, "subjects", (config.Subject("a"), config.Subject("a"))), "used twice"),
        (lambda c: setattr(c, "subjects", (config.Subject("a", "magic"),)), "magic"),
        (lambda c: setattr(c.generation, "scheduler", "heun"), "heun"),
        (lambda c: setattr(c, "concept", "rain"), "rain"),
        (lambda c: setattr(c.prompts, "n_harmful", 0), "n_harmful"),
        (lambda c: setattr(c.judges, "max_undecided", 2.0), "max_undecided"),
        (lambda c: setattr(c.bft, "samples", 10), "bft.samples"),
    ],
)
def test_config_names_the_field_at_fault(change, says):
    c = mini.get_config()
    change(c)
    with pytest.raises(ValueError, match=says):
        config.check(c)
