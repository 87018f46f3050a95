"""What a run keeps, on disk and in a bucket: files, checkpoints, images and the ids of cells."""

import copy
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint import v1 as ocp

from configs import mini, mini_full
from spqr_jax import config
from spqr_jax.config import BFT, Config, Generation, Judges, PerProfile, Prompts, Score, Subject
from spqr_jax.files import checkpoint, images, storage
from spqr_jax.run import cells, check, opening, stages
from spqr_jax.run.identity import Inputs
from spqr_jax.run.manifest import write_manifest


class Bucket(MemoryFileSystem):
    """Google Cloud Storage in memory: objects by name, no directories but those that names imply."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file  # every reader has its own place


@pytest.fixture
def bucket() -> Path:
    """A directory in an empty bucket. The clients of gs:// are fsspec's users here; Orbax has a client of its own."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    del Bucket.pseudo_dirs[1:]
    return storage.directory("gs://bucket/run")


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path) -> Path:
    return tmp_path if request.param == "local" else request.getfixturevalue("bucket")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_read_and_listed(folder):
    storage.write_text(folder / "a" / "note.json", "{}\r\né\n")
    assert (folder / "a" / "note.json").read_bytes() == "{}\r\né\n".encode()
    arrays = {"x": np.arange(6.0).reshape(2, 3), "name": np.array("n")}
    storage.write_npz(folder / "a" / "x.npz", **arrays)
    read = storage.read_npz(folder / "a" / "x.npz")
    assert set(read) == {"x", "name"}
    np.testing.assert_array_equal(read["x"], arrays["x"])
    assert [path.name for path in folder.glob("*/note.json")] == ["note.json"]
    assert [path.name for path in folder.glob("*/")] == ["a"]
    assert names(folder / "a") == ["note.json", "x.npz"]
    assert (folder / "a").is_dir()
    assert not (folder / "b").exists()
    with storage.local_copy(folder / "a" / "x.npz") as local:
        assert np.load(os.fspath(local))["name"] == "n"
    with storage.local_directory(folder / "report") as local:
        (local / "figures").mkdir(parents=True)
        (local / "figures" / "f.svg").write_text("<svg/>")
    assert (folder / "report" / "figures" / "f.svg").read_text() == "<svg/>"
    storage.remove(folder / "report")
    storage.remove(folder / "report")  # what is not there is not missed
    assert names(folder) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(folder):
    storage.write_text(folder / "board.json", "old")
    with pytest.raises(OSError, match="disk full"), storage.writing(folder / "board.json") as stream:
        stream.write(b"half of the n")
        raise OSError("disk full")
    assert (folder / "board.json").read_text() == "old"
    assert names(folder) == ["board.json"]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path):
    with storage.writing(tmp_path / "x") as one, storage.writing(tmp_path / "x") as other:
        one.write(b"one")
        other.write(b"the other")
        assert len(names(tmp_path)) == 2
        assert all(name.startswith("x.") and name.endswith(".partial") for name in names(tmp_path))
    assert (tmp_path / "x").read_bytes() == b"one"  # whose block ended last
    assert names(tmp_path) == ["x"]


def test_what_is_damaged_is_set_aside_file_or_directory(folder):
    for number in (1, 2):
        storage.write_text(folder / "f.json", f"damaged {number}")
        storage.write_text(folder / "d" / "part", f"damaged {number}")
        storage.set_aside(folder / "f.json", "a test")
        storage.set_aside(folder / "d", "a test")
    storage.set_aside(folder / "nothing", "a test")
    assert names(folder) == ["d.damaged-1", "d.damaged-2", "f.json.damaged-1", "f.json.damaged-2"]
    assert (folder / "d.damaged-2" / "part").read_text() == "damaged 2"


def test_lines_are_added_to_what_is_there(folder):
    for line in ("one", "two"):
        with storage.appending(folder / "steps.jsonl") as stream:
            stream.write(line + "\n")
    with storage.appending(folder / "steps.jsonl"):
        pass  # another process, which reports nothing
    assert (folder / "steps.jsonl").read_text() == "one\ntwo\n"


def test_a_file_is_shown_under_a_second_name(folder):
    storage.write_bytes(folder / "a" / "p.png", b"picture")
    storage.link(folder / "a" / "p.png", folder / "b" / "p.png")
    storage.write_bytes(folder / "b" / "q.png", b"kept")
    storage.link(folder / "a" / "p.png", folder / "b" / "q.png")
    assert (folder / "b" / "p.png").read_bytes() == b"picture"
    assert (folder / "b" / "q.png").read_bytes() == b"kept"
    if not storage.remote(folder):
        assert (folder / "a" / "p.png").stat().st_ino == (folder / "b" / "p.png").stat().st_ino


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://", "ftp://host/run"])
def test_a_scheme_that_is_not_known_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is no directory"):
        storage.directory(name)


def test_what_gs_needs_is_named_before_any_work(monkeypatch):
    def absent(_):
        raise ImportError("Please install something")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket/run needs the package gcsfs"):
        storage.directory("gs://bucket/run")


SMALL = Config(
    subjects=(Subject("UCE", "uce"),),
    prompts=Prompts(n_harmful=6, n_benign=6),
    generation=Generation(steps=2, guidance=4.0, scheduler="dpmpp"),
    bft=BFT(
        profiles=("lite",), samples=32, curriculum=(16, 32), steps=PerProfile(2, 2, 2), warmup_steps=1, eval_at=(2,)
    ),
    judges=Judges(n_reference=16),
    score=Score(replicates=100),
)


def carry_out(workdir: Path) -> None:
    """All stages, as launch.py runs them."""
    state = opening.open_run(SMALL, workdir)
    write_manifest(state, ["launch.py"])
    assert stages.carry_out(state, set(stages.NAMES)) == []


@pytest.fixture
def orbax_beside(monkeypatch, tmp_path):
    """Orbax's files of a bucket in a local directory, with its commit file in the bucket: TensorStore, which writes
    them, reaches no bucket in memory."""

    def beside(path: Path) -> Path:
        return tmp_path.joinpath("orbax", *path.parts[1:]) if storage.remote(path) else path

    def save(path, tree, **options):
        ocp.save(beside(path), tree, **options)
        if storage.remote(path):
            (path / "commit_success.txt").write_text("done")

    training = SimpleNamespace(**vars(ocp.training))
    training.Checkpointer = lambda path, **options: ocp.training.Checkpointer(beside(path), **options)
    elsewhere = SimpleNamespace(**vars(ocp))
    elsewhere.save, elsewhere.training = save, training
    elsewhere.load = lambda path, *wanted: ocp.load(beside(path), *wanted)
    elsewhere.metadata = lambda path: ocp.metadata(beside(path))
    monkeypatch.setattr(checkpoint, "ocp", elsewhere)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_local_run(bucket, orbax_beside, tmp_path):
    """Every stage; the same files with the same bytes, then only what is missing, and damage set aside."""
    carry_out(tmp_path / "run")
    carry_out(bucket)
    compared = 0
    for file in sorted((tmp_path / "run").rglob("*")):
        name = file.relative_to(tmp_path / "run").as_posix()
        if file.suffix in (".png", ".parquet", ".svg", ".npz", ".html") or file.name == "leaderboard.json":
            if file.name not in ("reference_statistics.npz", "index.html"):
                assert (bucket / name).read_bytes() == file.read_bytes(), name
            assert (bucket / name).exists() or file.name == "reference_statistics.npz", name
            compared += 1
    assert compared > 50
    assert len((next(bucket.glob("cells/*")) / "log" / "steps.jsonl").read_text().splitlines()) == 2

    damaged = next(name for name in sorted(Bucket.store) if "/after_benign/" in name)
    content = Bucket.store[damaged].getvalue()
    storage.directory(f"gs:/{damaged}").write_bytes(content[:100])
    next(bucket.glob("cells/*/cell.json")).unlink()
    carry_out(bucket)
    assert Bucket.store[damaged].getvalue() == content
    assert Bucket.store[f"{damaged}.damaged-1"].getvalue() == content[:100]
    assert [json.loads(p.read_text())["cell"] for p in bucket.glob("cells/*/cell.json")]


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


def ids(c: config.Config, **files) -> list[str]:
    """Ids of the cells; `files`: what differs in the content of the files that the config names."""
    prompts = {"harmful": f"{c.prompts.n_harmful} harmful", "benign": f"{c.prompts.n_benign} benign"}
    inputs = Inputs("sha", prompts, {name: name for name in c.bft.scenarios}, {"": "", "safe.pt": "sha of safe.pt"})
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
    same.bft.remat, same.bft.accumulate, same.mesh.fsdp = False, 1, True
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
    check.check(mini_full.get_config())


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
        check.check(c)
