"""The layout of a work directory, as design and docs promise it."""

from pathlib import Path

from spqr_jax.files.layout import AttackFolder, CellFolder, ReportFolder, SubjectFolder, Workdir, reference_statistics


def test_paths_are_those_of_the_documentation():
    run = Workdir(Path("run"))
    subject, cell, weights, attack = run.subject("s"), run.cell("c"), run.weights("k"), run.attack("a")
    found = {
        *(run.manifest, run.reference_features, reference_statistics(run.reference_features), run.leaderboard("md")),
        *(run.latents, run.batch_sizes, run.compilation_cache, run.jobs, run.report.page, run.report.thumbs),
        *(weights.params, weights.attached, weights.note, weights.times),
        *(subject.images("before", "benign"), subject.records, subject.phase_features("before"), subject.judged_by),
        *(cell.images("after", "harmful"), cell.records, cell.features, cell.drift, cell.summary, cell.adapted),
        *(cell.adapter, cell.log, cell.training, cell.times, run.leaderboard(), run.attack_scores()),
        *(attack.found, attack.summary, attack.images("before", "harmful"), attack.records),
    }
    assert {path.as_posix().removeprefix("run/") for path in found} == {
        *("manifest.json", "reference_features.npz", "reference_statistics.npz", "leaderboard.md", "leaderboard.json"),
        *("latents", "batch_sizes.json", "compilation_cache", "jobs", "report/index.html", "report/thumbs"),
        *("pipelines/k/params", "pipelines/k/attached", "pipelines/k/pipeline.json", "pipelines/k/times"),
        *("subjects/s/images/before_benign", "subjects/s/records.parquet", "subjects/s/features_before.npz"),
        *("subjects/s/judges.json", "cells/c/images/after_harmful", "cells/c/records.parquet", "cells/c/features.npz"),
        *("cells/c/drift.parquet", "cells/c/cell.json", "cells/c/adapted", "cells/c/adapter.safetensors"),
        *("cells/c/log", "cells/c/training", "cells/c/times", "attacks.json", "attacks/a/found.npz"),
        *("attacks/a/attack.json", "attacks/a/images/before_harmful", "attacks/a/records.parquet"),
    }
    assert run.report == ReportFolder(Path("run/report")) and cell.name == "c"


def test_cells_and_subjects_on_disk(tmp_path):
    run = Workdir(tmp_path)
    assert run.complete_cells() == run.incomplete_cells() == run.judged_subjects() == run.complete_attacks() == []
    for name in ("b", "a", "c"):
        run.cell(name).path.mkdir(parents=True)
        run.subject(name).path.mkdir(parents=True)
    for path in (run.cell("b").summary, run.cell("a").summary, run.subject("c").judged_by):
        path.touch()
    for name in "ba":
        run.attack(name).path.mkdir(parents=True)
    run.attack("b").summary.touch()
    assert run.complete_attacks() == [AttackFolder(tmp_path / "attacks" / "b")]
    assert run.complete_cells() == [CellFolder(tmp_path / "cells" / name) for name in "ab"]
    assert run.incomplete_cells() == [CellFolder(tmp_path / "cells" / "c")]
    assert run.judged_subjects() == [SubjectFolder(tmp_path / "subjects" / "c")]
