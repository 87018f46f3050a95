"""docs/records.md lists the columns that files have, and its queries run as they stand on a finished work directory."""

import re
from pathlib import Path

import pytest

from spqr_jax.files import records
from tests.score.invented import make_cell

TEXT = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def listed(heading: str) -> list[tuple[str, str]]:
    """Names and types of the columns in the table with this heading, in order."""
    rows = TEXT.split(f"| {heading} | type | meaning |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    return [(name, kind) for names, kind in cells for name in names.split(", ")]


def test_the_tables_list_the_columns_of_the_files():
    for heading, kind in (("column", records.IMAGES), ("column of drift.parquet", records.DRIFT)):
        types = {field.name: str(field.type).replace("double", "float64") for field in kind.schema}
        assert listed(heading) == list(types.items())


@pytest.fixture
def runs(tmp_path, monkeypatch):
    workdir = tmp_path / "runs" / "mini"
    workdir.mkdir(parents=True)
    make_cell(workdir, "esd", before=4, after=10, edit=lambda rows, a: ([r | {"image": "a.png"} for r in rows], a))
    monkeypatch.chdir(tmp_path)


def test_pandas(runs, capsys):
    pytest.importorskip("pandas")
    (code,) = blocks("python")
    exec(code, {})
    out = capsys.readouterr().out
    assert "25.0" in out and "10.0" in out  # h after and before


def test_duckdb(runs):
    duckdb = pytest.importorskip("duckdb")
    shares, lost = (duckdb.sql(query).fetchall() for query in blocks("sql"))
    assert shares == [("esd", "standard", "after", 25.0), ("esd", "standard", "before", 10.0)]
    assert len(lost) == 12 and {row[2] for row in lost} == {
        f"bad {i}" for i in range(4, 10)
    }  # 6 prompts, 2 images each
