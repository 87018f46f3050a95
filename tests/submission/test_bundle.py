"""Bundles: written whole, read strictly, without the text of prompts that are not in clear."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spqr_jax.files import records, storage
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import documents, evidence, pack, places, verify
from spqr_jax.submission.places import Refused
from tests.submission import invented


def refused(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        bundle_lib.read(path)
    return str(caught.value)


def reindexed(path: Path) -> None:
    """Rewrite sizes and hashes of the index to fit the files, as a cheater would."""
    head = json.loads((path / "submission.json").read_text())
    files = {name: path / name for name in head["files"]}
    head["files"] = {n: {"bytes": f.stat().st_size, "sha256": storage.sha256(f)} for n, f in files.items()}
    head["bytes"] = sum(entry["bytes"] for entry in head["files"].values())
    (path / "submission.json").write_bytes(documents.dumps(head))


def test_a_bundle_holds_what_the_run_measured(made):
    read = bundle_lib.read(made / "bundle")
    board = json.loads((made / "run" / "leaderboard.json").read_text())
    assert {k: v for k, v in read.leaderboard.items() if k != "evidence"} == board
    assert read.manifest == json.loads((made / "run" / "manifest.json").read_text())
    for cell in read.cells:
        folder = made / "run" / "cells" / cell.name
        rows = pq.read_table(folder / "records.parquet")
        for column in set(cell.records.column_names) - {"prompt", "clip_score"}:
            assert cell.records[column].equals(rows[column])
        assert np.array_equal(cell.records["clip_score"], rows["clip_score"], equal_nan=True)
        arrays = storage.read_npz(folder / "features.npz")
        assert all(np.array_equal(arrays[name], array) for name, array in cell.features.items())
        assert cell.drift.equals(pq.read_table(folder / "drift.parquet"))
    head = json.loads((made / "bundle" / "submission.json").read_text())
    sizes = {
        f.relative_to(made / "bundle").as_posix(): f.stat().st_size
        for f in (made / "bundle").rglob("*.*")
        if f.is_file()
    }
    sizes.pop("submission.json")
    assert {name: entry["bytes"] for name, entry in head["files"].items()} == sizes and head["bytes"] == sum(
        sizes.values()
    )


def test_the_same_run_gives_the_same_bundle_and_never_replaces_another(made, tmp_path):
    again = pack.of_run(made / "run")
    assert bundle_lib.write(again, made / "bundle") == made / "bundle"
    other = bundle_lib.write(again, tmp_path / "other")
    assert (other / "submission.json").read_bytes() == (made / "bundle" / "submission.json").read_bytes()
    changed = again._replace(manifest=again.manifest | {"devices": ["tpu: v9"]})
    before = (other / "submission.json").read_bytes()
    with pytest.raises(FileExistsError, match="something else"):
        bundle_lib.write(changed, other)
    assert (other / "submission.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]  # nothing half-written beside it


def test_texts_stay_out_unless_their_licence_lets_them(made, tmp_path, monkeypatch):
    text = pack.of_run(made / "run").prompts["harmful"]["prompts"][0]["text"]  # the emoji world's are in clear
    monkeypatch.setattr(pack, "is_own", lambda prompt_set: False)
    hidden = bundle_lib.write(pack.of_run(made / "run"), tmp_path / "hidden")
    held = b"".join(file.read_bytes() for file in hidden.rglob("*") if file.is_file())
    assert text.encode() not in held
    assert documents.sha256_of_text(text).encode() in held


def test_the_texts_of_a_set_that_is_named_are_in(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "is_own", lambda prompt_set: False)
    read = bundle_lib.read(bundle_lib.write(pack.of_run(made / "run", ["mini:benign"]), tmp_path / "one"))
    assert read.prompts["benign"]["clear"] and not read.prompts["harmful"]["clear"]
    texts = {role: {"text" in row for row in read.prompts[role]["prompts"]} for role in read.prompts}
    assert texts == {"benign": {True}, "harmful": {False}}
    assert verify.check(tmp_path / "one").verified


def test_a_run_without_one_of_its_cells_is_not_packed(made, tmp_path):
    invented.run(tmp_path / "run")
    next((tmp_path / "run" / "cells").glob("rece-*/cell.json")).unlink()
    with pytest.raises(ValueError, match="cell RECE x lite x general x seed 42 is missing"):
        pack.of_run(tmp_path / "run")


def test_a_changed_byte_is_named(copied):
    file = next(copied.glob("cells/uce-*/records.parquet"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert f"{file.relative_to(copied).as_posix()}: sha256" in refused(copied)


def test_a_changed_value_is_found_where_the_index_fits(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_bytes(documents.dumps(manifest | {"devices": ["gpu: B300"]}))
    reindexed(copied)
    assert "something was changed" in refused(copied)


def test_a_byte_that_changes_no_value_is_found_where_the_index_fits(copied):
    """Parquet keeps more than values: other readers skip rows by the statistics of a column."""
    file = next(copied.glob("cells/uce-*/records.parquet"))
    before = evidence.parquet(file.read_bytes(), records.IMAGES, file.name)
    pq.write_table(before, file, write_statistics=False)
    after = evidence.parquet(file.read_bytes(), records.IMAGES, file.name)
    assert evidence.digest_of_table(after) == evidence.digest_of_table(before)
    reindexed(copied)
    assert "something was changed" in refused(copied)


def test_names_lead_nowhere(copied, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").symlink_to(outside)
    assert "manifest.json: a link or a special file" in refused(copied)
    (copied / "manifest.json").unlink()
    assert "manifest.json: is missing" in refused(copied)
    os.mkfifo(copied / "cells" / "pipe")
    (copied / "cells" / "..hidden").mkdir()
    (copied / "run.pkl").write_bytes(b"\x80\x04.")
    text = refused(copied)
    assert all(f"{name}: " in text for name in ("cells/pipe", "cells/..hidden", "run.pkl"))
    linked = tmp_path / "linked"
    linked.symlink_to(copied)
    assert "expected a directory" in refused(linked)


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "cells/../manifest.json", "cells/x/run.py"])
def test_the_index_names_files_of_a_bundle_only(copied, name):
    head = json.loads((copied / "submission.json").read_text())
    head["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (copied / "submission.json").write_bytes(documents.dumps(head))
    assert f"{name}: is in the index and not in the bundle" in refused(copied)


def test_sizes_are_limits_before_anything_is_read(copied, monkeypatch):
    monkeypatch.setattr(places, "LARGEST_FILES", places.LARGEST_FILES | {".json": 1000})
    monkeypatch.setattr(places, "content", lambda *_: pytest.fail("read"))
    assert "bytes, more than the 1,000 that are read" in refused(copied)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1e999}', "infinite"),
        ('{"a": "\\ud800"}', "surrogates"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 10_000, "no JSON that is accepted"),
        ('{"b": 1, "a": 2}', "canonical form"),
        ('{\n "a": 1.50\n}\n', "canonical form"),
        ("\ufeff{}", "no JSON that is accepted"),
    ],
)
def test_json_has_one_form(text, reason):
    with pytest.raises(Refused, match=reason):
        documents.loads(text.encode("utf-8", "surrogatepass"), "x.json")


def parquet(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def bad_tables():
    kind = evidence.Kind(pa.schema([("text", pa.string()), ("n", pa.int64())]), "")
    good = pa.table({"text": ["a", "b"], "n": [1, 2]}, schema=kind.schema)
    yield kind, parquet(good), None
    yield kind, parquet(good.set_column(1, "n", pa.array([1.0, 2.0]))), "column n holds double"
    yield kind, parquet(good.rename_columns(["text", "m"])), "columns"
    yield kind, parquet(good.append_column("more", pa.array([1, 2]))), "columns"
    yield kind, parquet(good.set_column(0, "text", pa.array([None, "b"]))), r"column text holds an empty value"
    yield kind, parquet(good, compression="zstd"), "packed with"
    yield kind, b"PAR1 nothing PAR1", "no Parquet"
    many = pa.table({"text": ["a"] * 3_000_000, "n": np.zeros(3_000_000, np.int64)}, schema=kind.schema)
    yield kind, parquet(many), "more than 2,000,000 rows"
    long = pa.table({"text": ["x" * 70_000] * 2, "n": [1, 2]}, schema=kind.schema)
    yield kind, parquet(long), "a text of 70,000 bytes"
    repeated = pa.table(
        {"text": ["x" * 60_000] * 100_000, "n": np.zeros(100_000, np.int64)},
        schema=pa.schema([("text", pa.large_string()), ("n", pa.int64())]),
    )
    repeated = repeated.set_column(
        0, "text", repeated["text"].dictionary_encode().cast(pa.dictionary(pa.int32(), pa.string()))
    )
    yield kind, parquet(repeated, store_schema=False), "unpack to more than"


def test_parquet_is_what_it_says():
    for kind, data, reason in bad_tables():
        if reason is None:
            assert evidence.parquet(data, kind, "x").schema == kind.schema
            continue
        with pytest.raises(Refused, match=reason):
            evidence.parquet(data, kind, "x")


def npz(tmp_path: Path, save=np.savez, **arrays) -> bytes:
    with (tmp_path / "x.npz").open("wb") as stream:
        save(stream, **arrays)
    return (tmp_path / "x.npz").read_bytes()


def test_npz_is_what_it_says(tmp_path):
    expected = {"a": ("<f4", 2)}
    good = np.ones((3, 2), np.float32)
    assert np.array_equal(evidence.arrays(npz(tmp_path, a=good), expected, "x")["a"], good)
    pickled = npz(tmp_path, a=np.array([[{}]], dtype=object))
    wrong = [
        (npz(tmp_path, a=good.astype(np.float64)), "float64"),
        (npz(tmp_path, a=good, b=good), "arrays"),
        (npz(tmp_path, a=good[0]), "1 axes"),
        (npz(tmp_path, a=good.T), "axes, expected"),
        (npz(tmp_path, a=np.full((3, 2), np.nan, np.float32)), "NaN"),
        (npz(tmp_path, np.savez_compressed, a=np.zeros((4000, 4000), np.float32)), "packed"),
        (pickled, "object"),
        (npz(tmp_path, a=good).replace(b"(3, 2)", b"(9, 2)"), "does not fit|Bad CRC"),
        (b"PK nothing", "no npz"),
    ]
    for data, reason in wrong:
        with pytest.raises(Refused, match=reason):
            evidence.arrays(data, expected, "x")


def test_digests_are_of_values(tmp_path):
    table = pa.table({"text": ["a", "b"], "n": [1, 2], "x": [0.5, float("nan")]})
    again = pq.read_table(pa.BufferReader(parquet(table, use_dictionary=False, compression=None)))
    assert evidence.digest_of_table(table) == evidence.digest_of_table(again)
    for column, values in (("text", ["a", "c"]), ("n", [1, 3]), ("x", [0.5, 0.25])):
        other = table.set_column(table.column_names.index(column), column, pa.array(values))
        assert evidence.digest_of_table(other) != evidence.digest_of_table(table)
    moved = pa.table({"text": ["ab", ""], "n": [1, 2], "x": [0.5, float("nan")]})
    joined = pa.table({"text": ["a", "b"], "n": [1, 2], "x": [0.5, float("nan")]})
    assert evidence.digest_of_table(moved) != evidence.digest_of_table(joined)
