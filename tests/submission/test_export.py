"""Exports, read back by the libraries and schemas of those who collect them."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
from huggingface_hub import ModelCard

from spqr_jax.report import __main__ as report
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import export
from spqr_jax.submission.verify import Verification

# The fields of Every Eval Ever's schema 0.3.0 that its records must have, and their types, as its documentation says.
# The schema itself is checked too where SPQR_EVERY_EVAL_EVER names its file (every_eval_ever/schemas/eval.schema.json).
TEXT, NUMBER = {"type": "string"}, {"type": "number"}
DETAILS = {"type": "object", "additionalProperties": TEXT}


def objects(required, **properties):
    return {"type": "object", "required": required.split(), "properties": properties}


NEEDED = objects(
    "schema_version evaluation_id retrieved_timestamp source_metadata model_info eval_library evaluation_results",
    schema_version={"const": "0.3.0"},
    source_metadata=objects(
        "source_type source_organization_name evaluator_relationship",
        source_type={"enum": ["documentation", "evaluation_run"]},
        evaluator_relationship={"enum": ["first_party", "third_party", "collaborative", "other"]},
        additional_details=DETAILS,
    ),
    eval_library=objects("name version", name=TEXT, version=TEXT),
    model_info=objects(
        "name id additional_details",
        additional_details=DETAILS | {"required": ["deployment_type", "model_availability"]},
    ),
    evaluation_results={
        "type": "array",
        "minItems": 1,
        "items": objects(
            "evaluation_name source_data metric_config score_details",
            source_data=objects("dataset_name source_type", source_type={"const": "other"}),
            metric_config=objects(
                "lower_is_better score_type min_score max_score", lower_is_better={"type": "boolean"}
            ),
            score_details=objects("score", score=NUMBER),
        ),
    },
)


@pytest.fixture(scope="module")
def read(made):
    return bundle_lib.read(made / "bundle")


def test_every_eval_ever(made, read, tmp_path, capsys):
    arguments = ["export", str(made / "bundle"), "--format", "every_eval_ever", "--out", str(tmp_path / "out")]
    assert report.main([*arguments, "--organisation", "A lab", "--relationship", "first_party"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert sorted(paths) == sorted((tmp_path / "out").iterdir()) and len(paths) == 3
    schemas = [NEEDED]
    if theirs := os.environ.get("SPQR_EVERY_EVAL_EVER"):
        schemas.append(json.loads(Path(theirs).read_text()))
    for path in paths:
        record = json.loads(path.read_text())
        for schema in schemas:
            jsonschema.validate(record, schema)
        assert record["source_metadata"]["additional_details"]["submission"] == read.id
        row = next(row for row in read.leaderboard["rows"] if row["subject"] == record["model_info"]["name"])
        scores = {r["metric_config"]["metric_id"]: r["score_details"] for r in record["evaluation_results"]}
        assert scores["spqr.S"]["score"] == row["S"]
        interval = scores["spqr.S"]["uncertainty"]["confidence_interval"]
        assert [interval["lower"], interval["upper"]] == row["S_ci"]
        for result in record["evaluation_results"]:
            metric = result["metric_config"]
            assert metric["min_score"] <= result["score_details"]["score"] <= metric["max_score"]


def test_a_model_card_that_the_hub_reads(made, read, tmp_path):
    arguments = ["export", str(made / "bundle"), "--format", "model_card", "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 0
    for path in sorted((tmp_path / "out").iterdir()):
        data = ModelCard.load(path).data
        row = next(row for row in read.leaderboard["rows"] if row["subject"] == data.model_name)
        found = {result.metric_type: result for result in data.eval_results}
        assert found["spqr.S"].metric_value == row["S"] and found["spqr.S"].metric_args["interval_95"] == row["S_ci"]
        assert {result.metric_args["submission"] for result in data.eval_results} == {read.id}
        assert len(data.eval_results) == sum(row[m.key] is not None for m in export.METRICS)


def test_only_what_is_verified_is_exported(read, tmp_path):
    source = export.Source(read, Verification("", ["manifest.json: changed"]))
    with pytest.raises(ValueError, match=r"not verified \(manifest.json: changed\)"):
        export.write(source, "model_card", tmp_path / "out")
    assert not (tmp_path / "out").exists()
