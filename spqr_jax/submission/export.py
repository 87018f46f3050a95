"""A verified submission in the formats that others collect results in.

- every_eval_ever: a record a subject for the schema of that name (version 0.3.0), in which evaluations of any kind are
  collected
- model_card: the results section ("model-index") of a model's card on the Hugging Face hub, a card a subject

Every exported figure carries the id of the submission, so that who reads it can verify it.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.files import storage
from spqr_jax.submission.bundle import Bundle
from spqr_jax.submission.verify import Verification

SCHEMA_VERSION = "0.3.0"
RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")


class Metric(NamedTuple):
    """A figure of a row, as other formats describe it."""

    key: str
    name: str
    unit: str
    lower_is_better: bool
    low: float
    high: float


METRICS = (
    Metric("SPQR", "SPQR, logistic R", "proportion", False, 0.0, 1.0),
    Metric("SPQR_exponential", "SPQR, exponential R", "proportion", False, 0.0, 1.0),
    Metric("S", "Safety before fine-tuning", "proportion", False, 0.0, 1.0),
    Metric("P", "Prompt adherence before fine-tuning", "proportion", False, 0.0, 1.0),
    Metric("Q", "Quality before fine-tuning, within the cohort", "proportion", False, 0.0, 1.0),
    Metric("R", "Robustness to benign fine-tuning, logistic", "proportion", False, 0.0, 1.0),
    Metric("R_exponential", "Robustness to benign fine-tuning, exponential", "proportion", False, 0.0, 1.0),
    Metric("h_before", "Unsafe images before fine-tuning", "percent", True, 0.0, 100.0),
    Metric("h_after", "Unsafe images after fine-tuning", "percent", True, 0.0, 100.0),
    Metric("dh", "Drift of unsafe images", "points", True, -100.0, 100.0),
)


class Source(NamedTuple):
    """Where an export comes from: a verified bundle, who evaluated, and when it is exported (seconds since 1970)."""

    bundle: Bundle
    verification: Verification
    organisation: str = "unknown"
    relationship: str = "other"
    when: int = 0

    @property
    def subjects(self) -> list[str]:
        """Subjects with a row, in the order of the leaderboard."""
        return list(dict.fromkeys(row["subject"] for row in self.bundle.leaderboard["rows"]))


def figures(bundle: Bundle, subject: str) -> Iterator[tuple[dict[str, Any], Metric]]:
    """The rows of a subject with each of METRICS that they have."""
    for row in bundle.leaderboard["rows"]:
        if row["subject"] == subject:
            yield from ((row, metric) for metric in METRICS if row[metric.key] is not None)


def _prompt_sets(bundle: Bundle) -> str:
    return ", ".join(bundle.prompts[role]["set"] for role in ("harmful", "benign"))


# Every Eval Ever


def every_eval_ever(source: Source, subject: str) -> str:
    """The record of a subject as JSON."""
    bundle = source.bundle
    settings = next(s for s in bundle.manifest["config"]["subjects"] if s["name"] == subject)
    record = {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"spqr/{_slug(subject)}/{source.when}",
        "retrieved_timestamp": str(source.when),
        "source_metadata": {
            "source_name": f"SPQR, {bundle.manifest['protocol']['label']}",
            "source_type": "evaluation_run",
            "source_organization_name": source.organisation,
            "evaluator_relationship": source.relationship,
            "additional_details": {
                "submission": bundle.id,
                "evidence": bundle.leaderboard["evidence"],
                "division": source.verification.division,
            },
        },
        "eval_library": {"name": "spqr-jax", "version": bundle.manifest["versions"].get("spqr-jax", "unknown")},
        "model_info": {
            "name": subject,
            "id": f"{bundle.cells[0].info['backbone']}/{_slug(subject)}",
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown",
                "method": settings["method"],
                "backbone_sha256": bundle.manifest["sha256"]["backbone"],
            },
        },
        "evaluation_results": [_result(bundle, row, metric) for row, metric in figures(bundle, subject)],
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _result(bundle: Bundle, row: dict[str, Any], metric: Metric) -> dict[str, Any]:
    score: dict[str, Any] = {"score": row[metric.key]}
    if row[f"{metric.key}_ci"] is not None:
        low, high = row[f"{metric.key}_ci"]
        bootstrap = bundle.leaderboard["bootstrap"]
        interval = {"lower": low, "upper": high, "confidence_level": 0.95, "method": bootstrap["method"]}
        score["uncertainty"] = {"confidence_interval": interval, "num_bootstrap_samples": bootstrap["replicates"]}
    return {
        "evaluation_result_id": f"{row['profile']}/{row['scenario']}/{metric.key}",
        "evaluation_name": f"SPQR / {row['profile']} / {row['scenario']}",
        "source_data": {"dataset_name": _prompt_sets(bundle), "source_type": "other"},
        "metric_config": {
            "metric_id": f"spqr.{metric.key}",
            "metric_name": metric.name,
            "metric_unit": metric.unit,
            "lower_is_better": metric.lower_is_better,
            "score_type": "continuous",
            "min_score": metric.low,
            "max_score": metric.high,
        },
        "score_details": score,
    }


# The Hugging Face hub


def model_card(source: Source, subject: str) -> str:
    """The results section of a subject as a card: a YAML header and nothing else."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    bundle = source.bundle
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="spqr",
            dataset_name=f"SPQR ({_prompt_sets(bundle)})",
            dataset_config=f"{row['protocol']} / {row['profile']} / {row['scenario']}",
            dataset_revision=bundle.prompts["harmful"]["sha256"],
            metric_type=f"spqr.{metric.key}",
            metric_name=metric.name,
            metric_value=row[metric.key],
            metric_args={"interval_95": row[f"{metric.key}_ci"], "submission": bundle.id},
        )
        for row, metric in figures(bundle, subject)
    ]
    data = ModelCardData(model_name=subject, eval_results=results)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n"))


FORMATS: dict[str, tuple[Callable[[Source, str], str], str]] = {
    "every_eval_ever": (every_eval_ever, "json"),
    "model_card": (model_card, "md"),
}


def write(source: Source, kind: str, out: Path) -> list[Path]:
    """Write a file a subject into a directory and return their paths, in the order of the leaderboard.

    kind: one of FORMATS. Raises ValueError for a bundle that is not verified.
    """
    if not source.verification.verified:
        raise ValueError(f"the bundle is not verified ({source.verification.faults[0]}); it is not exported.")
    made, suffix = FORMATS[kind]
    paths = []
    for i, subject in enumerate(source.subjects, 1):
        path = out / f"{i:02d}-{_slug(subject)}.{suffix}"
        storage.write_text(path, made(source, subject))
        paths.append(path)
    return paths


def _slug(name: str) -> str:
    """A name that is safe in paths and ids."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "subject"
