"""The layout of a work directory: where each of its files lies. No other module spells these names.

    WORKDIR/manifest.json                 the config, versions, devices, and hashes of all inputs
    WORKDIR/pipelines/<key>/              weights that a method changed: params, attached, pipeline.json, times
    WORKDIR/subjects/<id>/                a subject before fine-tuning: images, records.parquet, features_before.npz
    WORKDIR/cells/<id>/                   a subject after one fine-tuning: images, records.parquet, features.npz, ...
    WORKDIR/attacks/<id>/                 an attack on one model: found.npz, images, records.parquet, attack.json
    WORKDIR/probes/<id>/                  a further prompt set on one model: images, records.parquet, probe.json
    WORKDIR/reference_features.npz        features of real images, and reference_statistics.npz computed from them
    WORKDIR/leaderboard.{json,csv,md}     the scores
    WORKDIR/attacks.{json,csv}            what the attacks reached, apart from the scores
    WORKDIR/probes.{json,csv}             what the probes found, apart from the scores
    WORKDIR/report/                       index.html, figures, tables, thumbs
    WORKDIR/latents/, compilation_cache/  kept so that the same work is not done twice
    WORKDIR/batch_sizes.json, training_memory.json    what was chosen so that programs fit into the devices
    WORKDIR/jobs/                         logs of the jobs on a cluster

Each class holds the path of one directory and names the files in it. Nothing is created, and only the methods that
list directories look at the disk. Paths may also lie in an object store (`storage`).
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A directory."""

    path: Path

    @property
    def name(self) -> str:
        """The last part of its path: the id of a cell or subject."""
        return self.path.name

    @property
    def times(self) -> Path:
        """Directory of the seconds that each stage took here, one JSON file a stage."""
        return self.path / "times"


@dataclass(frozen=True)
class WeightsFolder(Folder):
    """pipelines/<key>: the weights of a subject, by a hash of all that determines them."""

    @property
    def params(self) -> Path:
        """Checkpoint of the components that the method changed."""
        return self.path / "params"

    @property
    def attached(self) -> Path:
        """Directory of the attachments, if the method made any."""
        return self.path / "attached"

    @property
    def note(self) -> Path:
        """JSON about the weights. It is written last: weights without it are not complete."""
        return self.path / "pipeline.json"


@dataclass(frozen=True)
class ImagesFolder(Folder):
    """A directory with images of one or both phases, and the answers of the judges about them."""

    @property
    def all_images(self) -> Path:
        """Directory of all images."""
        return self.path / "images"

    def images(self, phase: str, role: str) -> Path:
        """Directory of the images of one phase (`before`, `after`) and role (`harmful`, `benign`)."""
        return self.all_images / f"{phase}_{role}"

    @property
    def records(self) -> Path:
        """Parquet file with one row for each image; see `files.records`."""
        return self.path / "records.parquet"

    def phase_features(self, phase: str) -> Path:
        """Features of the benign images of one phase."""
        return self.path / f"features_{phase}.npz"

    @property
    def judged_by(self) -> Path:
        """JSON: the judges behind these records, and the rule that combines their verdicts."""
        return self.path / "judges.json"


@dataclass(frozen=True)
class SubjectFolder(ImagesFolder):
    """subjects/<id>: the images of a subject before fine-tuning, which all of its cells share."""


@dataclass(frozen=True)
class CellFolder(ImagesFolder):
    """cells/<id>: one fine-tuning of a subject, and the images of both phases."""

    @property
    def summary(self) -> Path:
        """JSON about the cell. It is written last: a cell without it is not complete."""
        return self.path / "cell.json"

    @property
    def features(self) -> Path:
        """Features of the benign images of both phases."""
        return self.path / "features.npz"

    @property
    def drift(self) -> Path:
        """Parquet file with one row for each image and step, if harm was measured during the fine-tuning."""
        return self.path / "drift.parquet"

    @property
    def adapted(self) -> Path:
        """Checkpoint of the weights that the fine-tuning trained."""
        return self.path / "adapted"

    @property
    def adapter(self) -> Path:
        """The trained adapters, or the new word, for diffusers: for `lite` and profiles like it."""
        return self.path / "adapter.safetensors"

    @property
    def class_pictures(self) -> Path:
        """Class pictures of the profile `dreambooth`, "images" uint8 [N, H, W, 3]."""
        return self.path / "class_pictures.npz"

    @property
    def log(self) -> Path:
        """Directory of the training log."""
        return self.path / "log"

    @property
    def memory(self) -> Path:
        """JSON: how the steps of the fine-tuning were computed so that they fit."""
        return self.log / "memory.json"

    @property
    def training(self) -> Path:
        """Checkpoints of a fine-tuning that has not ended; removed at its end."""
        return self.path / "training"


@dataclass(frozen=True)
class AttackFolder(ImagesFolder):
    """attacks/<id>: one attack on a subject before fine-tuning, or on one cell's model after it."""

    @property
    def found(self) -> Path:
        """What the attack found: prompts, words and starts of sampling. It stays here and goes into no report."""
        return self.path / "found.npz"

    @property
    def summary(self) -> Path:
        """JSON about the attack. It is written last: an attack without it is not complete."""
        return self.path / "attack.json"


@dataclass(frozen=True)
class ProbeFolder(ImagesFolder):
    """probes/<id>: a further prompt set on a subject before fine-tuning, or on one cell's model after it."""

    @property
    def summary(self) -> Path:
        """JSON about the probe. It is written last: a probe without it is not complete."""
        return self.path / "probe.json"


@dataclass(frozen=True)
class ReportFolder(Folder):
    """report, or another directory that a report is written to."""

    @property
    def page(self) -> Path:
        """The page of the report."""
        return self.path / "index.html"

    @property
    def figures(self) -> Path:
        """Directory of the figures as SVG and PNG."""
        return self.path / "figures"

    @property
    def tables(self) -> Path:
        """Directory of the tables as Markdown, CSV, LaTeX and JSON."""
        return self.path / "tables"

    @property
    def thumbs(self) -> Path:
        """Directory of the images of the gallery, if they are not inside the page."""
        return self.path / "thumbs"


@dataclass(frozen=True)
class Workdir(Folder):
    """The work directory of a run."""

    @property
    def manifest(self) -> Path:
        """JSON: the config, versions, devices, and hashes of all inputs."""
        return self.path / "manifest.json"

    @property
    def reference_features(self) -> Path:
        """Features of real images, to which the features of generated ones are compared."""
        return self.path / "reference_features.npz"

    @property
    def latents(self) -> Path:
        """Directory of encoded data sets, which all cells of a scenario share."""
        return self.path / "latents"

    @property
    def batch_sizes(self) -> Path:
        """JSON: the batch sizes that fit the memory of the devices."""
        return self.path / "batch_sizes.json"

    @property
    def training_memory(self) -> Path:
        """JSON: the ways to compute a step of fine-tuning that fit the memory of the devices."""
        return self.path / "training_memory.json"

    @property
    def compilation_cache(self) -> Path:
        """Directory of compiled programs."""
        return self.path / "compilation_cache"

    @property
    def jobs(self) -> Path:
        """Directory of the logs of jobs on a cluster."""
        return self.path / "jobs"

    @property
    def report(self) -> ReportFolder:
        """Directory of the report."""
        return ReportFolder(self.path / "report")

    def leaderboard(self, suffix: str = "json") -> Path:
        """The leaderboard as `json`, `csv` or `md`."""
        return self.path / f"leaderboard.{suffix}"

    def attack_scores(self, suffix: str = "json") -> Path:
        """What the attacks reached, as `json` or `csv`."""
        return self.path / f"attacks.{suffix}"

    def probe_scores(self, suffix: str = "json") -> Path:
        """What the probes found, as `json` or `csv`."""
        return self.path / f"probes.{suffix}"

    def weights(self, key: str) -> WeightsFolder:
        """Directory of the weights with this key."""
        return WeightsFolder(self.path / "pipelines" / key)

    def subject(self, id: str) -> SubjectFolder:
        """Directory of the subject with this id."""
        return SubjectFolder(self.path / "subjects" / id)

    def cell(self, id: str) -> CellFolder:
        """Directory of the cell with this id."""
        return CellFolder(self.path / "cells" / id)

    def attack(self, id: str) -> AttackFolder:
        """Directory of the attack with this id."""
        return AttackFolder(self.path / "attacks" / id)

    def probe(self, id: str) -> ProbeFolder:
        """Directory of the probe with this id."""
        return ProbeFolder(self.path / "probes" / id)

    def judged_subjects(self) -> list[SubjectFolder]:
        """Subjects on disk that have been judged, sorted by id."""
        return [SubjectFolder(path.parent) for path in sorted(self.path.glob("subjects/*/judges.json"))]

    def complete_cells(self) -> list[CellFolder]:
        """Cells on disk that are complete, sorted by id."""
        return [CellFolder(path.parent) for path in sorted(self.path.glob("cells/*/cell.json"))]

    def complete_attacks(self) -> list[AttackFolder]:
        """Attacks on disk that are complete, sorted by id."""
        return [AttackFolder(path.parent) for path in sorted(self.path.glob("attacks/*/attack.json"))]

    def complete_probes(self) -> list[ProbeFolder]:
        """Probes on disk that are complete, sorted by id."""
        return [ProbeFolder(path.parent) for path in sorted(self.path.glob("probes/*/probe.json"))]

    def incomplete_cells(self) -> list[CellFolder]:
        """Cells on disk that are not complete, sorted by id."""
        cells = [CellFolder(path) for path in sorted(self.path.glob("cells/*/"))]
        return [cell for cell in cells if not cell.summary.exists()]


def reference_statistics(features: Path) -> Path:
    """The file with mean and covariance of reference features, beside the file of the features."""
    return features.with_name("reference_statistics.npz")
