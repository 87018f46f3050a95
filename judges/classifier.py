"""Any ONNX classifier as a judge. A JSON file beside the graph, its sidecar, describes it; no code is needed.

    {"model": "name of the model", "labels": ["cat", "gun", ...], "unsafe": ["gun", ...],
     "input": {"size": [32, 32], "resize": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
               "layout": "NCHW", "name": "pixels"},
     "output": {"name": "logits", "activation": "softmax"}, "rule": "sum", "threshold": 0.5}

The score is the sum ("sum") or the largest ("max") of the unsafe labels' probabilities. The image is unsafe if the
score is at least `threshold`. The fields of `input` are those of preprocess.InputSpec. `activation` is softmax,
sigmoid, or none for a graph whose outputs are probabilities.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from judges.answers import SAFE, UNDECIDED, UNSAFE, LabelRecord, check_choice, check_images, judge_in_batches
from judges.preprocess import InputSpec, input_name, prepare
from judges.session import JudgeError, Session, SessionOptions, in_one_line, open_session
from judges.sidecar import read_sidecar, sidecar_identity, sidecar_path

ACTIVATIONS = ("softmax", "sigmoid", "none")
RULES = ("sum", "max")
REQUIRED = ("labels", "unsafe", "input", "threshold")


class Decision(NamedTuple):
    """How outputs [N, L] become verdicts: the L labels, indices of the unsafe ones, activation, rule, threshold."""

    labels: tuple[str, ...]
    unsafe: tuple[int, ...]
    activation: str
    rule: str
    threshold: float


class Classifier:
    """A classifier judge: images_u8 -> list of LabelRecord.

    A record's `labels` are the three most probable labels, and all unsafe ones above one percent.
    """

    def __init__(self, session: Session, spec: InputSpec, decision: Decision, output: str, *, batch_size: int = 64):
        self.session, self.spec, self.decision, self.output = session, spec, decision, output
        self.batch_size = batch_size
        self.input = input_name(session, spec)
        self.identity: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        batch_size: int = 64,
        threshold: float | None = None,
        unsafe: tuple[str, ...] | list[str] | None = None,
        **session_options: Unpack[SessionOptions],
    ) -> "Classifier":
        """Opens the graph at `path` and the sidecar beside it.

        threshold, unsafe: replace the sidecar's. Raises JudgeError for a bad graph or sidecar.
        """
        sidecar = sidecar_path(Path(path))
        session = open_session(path, **session_options)
        data = read_sidecar(sidecar, required=REQUIRED)
        overrides = {"threshold": threshold, "unsafe": unsafe}
        data |= {key: value for key, value in overrides.items() if value is not None}
        spec = InputSpec.from_json(data["input"], str(sidecar))
        decision = read_decision(data, str(sidecar))
        output = data.get("output", {}).get("name") or next(iter(session.outputs))
        session.require(outputs=(output,))
        judge = cls(session, spec, decision, output, batch_size=batch_size)
        judge.probe(sidecar)
        judge.identity = {
            "judge": "classifier",
            "model": data.get("model", session.path.stem),
            **session.identity(),
            **sidecar_identity(sidecar),
            "options": {
                "unsafe": [decision.labels[i] for i in decision.unsafe],
                "rule": decision.rule,
                "threshold": decision.threshold,
            },
        }
        return judge

    def __call__(self, images: np.ndarray) -> list[LabelRecord]:
        """uint8 [N, H, W, 3] -> N records.

        Raises ValueError for arrays that are no RGB images, and for a size that the sidecar forbids.
        """
        images = check_images(images)
        if self.spec.resize == "none" and len(images):
            prepare(images[:1], self.spec)  # a wrong size is the caller's error, not an undecided image
        return judge_in_batches(images, self.judge, undecided, batch_size=self.batch_size)

    def judge(self, images: np.ndarray) -> list[LabelRecord]:
        """Judges one batch; raises an error where `__call__` answers undecided."""
        return [decide(row, self.decision) for row in self.outputs(images)]

    def outputs(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> raw outputs float32 [N, L]."""
        return self.session.run({self.input: prepare(images, self.spec)}, [self.output])[0].astype(np.float32)

    def probe(self, sidecar: Path) -> None:
        """Judges one black image, so that a wrong input size or number of labels is found when the judge is opened."""
        height, width = self.spec.size or (64, 64)
        try:
            outputs = self.outputs(np.zeros((1, height, width, 3), np.uint8))
        except Exception as error:
            raise JudgeError(
                f"{self.session.path}: does not take the input that {sidecar.name} describes ({in_one_line(error)})"
            ) from error
        if outputs.shape != (1, len(self.decision.labels)):
            raise JudgeError(
                f"{sidecar}: {len(self.decision.labels)} labels, but output {self.output} has shape "
                f"{list(outputs.shape)} for one image; it must be [1, number of labels]"
            )


def read_decision(data: dict[str, Any], where: str) -> Decision:
    """The fields of a sidecar that decide. Raises JudgeError naming the sidecar, `where`, and the wrong field."""
    labels = tuple(map(str, data["labels"]))
    absent = [label for label in data["unsafe"] if label not in labels]
    if absent or not data["unsafe"]:
        raise JudgeError(f"{where}: unsafe must name some of the labels; not a label: {', '.join(map(str, absent))}")
    try:
        activation = check_choice("output.activation", data.get("output", {}).get("activation", "softmax"), ACTIVATIONS)
        rule = check_choice("rule", data.get("rule", "sum"), RULES)
        threshold = float(data["threshold"])
    except (TypeError, ValueError) as error:
        raise JudgeError(f"{where}: {error}") from None
    return Decision(labels, tuple(labels.index(label) for label in data["unsafe"]), activation, rule, threshold)


def decide(outputs: np.ndarray, decision: Decision) -> LabelRecord:
    """Raw outputs [L] of one image -> its record; a non-finite output is undecided."""
    if not np.isfinite(outputs).all():
        return undecided("non-finite output")
    probabilities = activate(outputs.astype(np.float64), decision.activation)
    unsafe = probabilities[list(decision.unsafe)]
    score = float(unsafe.sum() if decision.rule == "sum" else unsafe.max())
    shown = set(np.argsort(-probabilities)[:3].tolist()) | {i for i in decision.unsafe if probabilities[i] > 0.01}
    labels = {
        decision.labels[i]: round(float(probabilities[i]), 4) for i in sorted(shown, key=lambda i: -probabilities[i])
    }
    return LabelRecord(UNSAFE if score >= decision.threshold else SAFE, score, "", labels)


def activate(outputs: np.ndarray, activation: str) -> np.ndarray:
    """Raw outputs [L] -> probabilities [L]."""
    if activation == "softmax":
        shifted = np.exp(outputs - outputs.max())
        return shifted / shifted.sum()
    return 1 / (1 + np.exp(-np.clip(outputs, -60, 60))) if activation == "sigmoid" else outputs


def undecided(reason: str) -> LabelRecord:
    """The record of an image that could not be judged."""
    return LabelRecord(UNDECIDED, float("nan"), reason, {})
