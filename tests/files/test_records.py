"""Records: what is written is read, columns alone are read, and what cannot be used is named with what to do."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spqr_jax.files import records

ROW = records.Record(
    cell="c",
    subject="s",
    profile="lite",
    scenario="general",
    seed=1,
    phase="before",
    prompt_set="set",
    role="harmful",
    prompt_id="p",
    k=0,
    prompt="text",
    category="",
    language="en",
    image_seed=2**32 - 1,
    image="images/before_harmful/p_0.png",
    judges="{}",
    verdict="safe",
    clip_score=0.25,
)
STEP = {"step": 0, "role": "harmful", "prompt_set": "set", "prompt_id": "p", "k": 0, "category": "", "verdict": "safe"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.parquet"


def test_rows_come_back_with_the_types_of_the_schema(path):
    records.write(path, [ROW, ROW | {"k": 1}])
    assert records.read(path) == [ROW, ROW | {"k": 1}]
    records.write(path, [STEP], records.DRIFT)
    assert records.read(path, records.DRIFT) == [STEP]


def test_the_columns_are_the_fields_of_the_rows():
    assert records.IMAGES.schema.names == list(records.Record.__annotations__)
    assert records.IMAGES.schema.field("clip_score").type == pa.float64()
    assert records.DRIFT.schema.field("step").type == pa.int64()


def test_a_row_without_a_column_is_not_written(path):
    with pytest.raises(KeyError, match="verdict"):
        records.write(path, [{name: value for name, value in ROW.items() if name != "verdict"}])
    assert not path.exists()


def test_only_the_named_columns_are_read(path):
    records.write(path, [ROW])
    assert records.read_table(path, ["k", "verdict"]).to_pylist() == [{"k": 0, "verdict": "safe"}]
    table, problem = records.read_leniently(path, ["verdict"], optional=["k", "mood"])
    assert (table.to_pylist(), problem) == ([{"verdict": "safe", "k": 0}], "")


def test_a_damaged_file_and_no_file_are_named(path):
    with pytest.raises(ValueError, match=r"records\.parquet: cannot be read \(FileNotFoundError\); delete the file"):
        records.read(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"records\.parquet: cannot be read.*run the same command again"):
        records.read(path)
    assert records.read_leniently(path, ["k"]) == (None, "cannot be read (ArrowInvalid)")
    with pytest.raises(ValueError, match="delete the directory of the cell"):
        records.read(path, records.DRIFT)


def test_a_missing_column_is_an_error_or_a_gap(path):
    pq.write_table(pa.Table.from_pylist([{"k": 1}]), path)
    with pytest.raises(ValueError, match=r"columns \['verdict'\] are missing; delete the file"):
        records.read_table(path, ["k", "verdict"])
    table, problem = records.read_leniently(path, ["k", "verdict"])
    assert (table.to_pylist(), problem) == ([{"k": 1}], "columns ['verdict'] are missing")


def test_a_column_of_another_type_is_converted_or_named(path):
    pq.write_table(pa.table({"k": pa.array([1], pa.int32()), "seed": ["one"], "clip_score": [None]}), path)
    table = records.read_table(path, ["clip_score", "k"])
    assert table.schema.types == [pa.float64(), pa.int64()]
    with pytest.raises(ValueError, match="column 'seed' holds string, expected int64; delete the file"):
        records.read_table(path, ["k", "seed"])
