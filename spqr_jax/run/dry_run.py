"""The work that a run still has to do, and its time at the rates measured in the run's own work directory."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import jax

from spqr_jax import profiles, protocols
from spqr_jax.config import Config
from spqr_jax.files.layout import ImagesFolder, Workdir
from spqr_jax.run import attempts, cells, protocol
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.bft import length, num_steps
from spqr_jax.run.probes import Probing
from spqr_jax.run.stages import found
from spqr_jax.run.stages import probe as probe_stage
from spqr_jax.run.stages.pictures import Job, phase_jobs, picture_path
from spqr_jax.run.stages.state import Run, read_times

# kind of work -> number; a kind is "align", "picture", "step" and a profile, or "prompt of" and an attack
Counts = dict[str, float]


def plan(config: Config) -> str:
    """What a resolved config asks for, from itself alone: its protocol, its prompts, and the steps of each profile."""
    bft, stated = config.bft, protocol.statement(config)
    lines = [f"Protocol: {stated.label}."]
    lines += [f"  {field}: {ours}, the protocol has {theirs}." for field, (ours, theirs) in stated.changed.items()]
    lines.append(
        f"Prompts: {config.prompts.n_harmful} harmful of {config.prompts.harmful}, {config.prompts.n_benign} benign of "
        f"{config.prompts.benign}."
    )
    for profile in bft.profiles:
        if name := protocols.adapter_of(profile):
            lines.append(f"Instead of fine-tuning, {profile}: {bft.own.adapters.get(name, name)}, merged.")
            continue
        steps, (given, passes) = num_steps(bft, profile, bft.samples), length(bft, profile)
        source = "as the config says" if given else f"{passes} pass{'es' if passes != 1 else ''} over each stage"
        data = f"curriculum {bft.stages} {bft.curriculum}"
        if profile in profiles.OF_FEW_PICTURES:
            data = f"{bft.own.n_pictures} pictures of {bft.own.pictures}"
        lines.append(f"Fine-tuning, {profile}: {steps:,} steps ({source}), {data}.")
    for attack in config.attacks:
        models = "made once on the unaligned model" if attack.transfer else "made on every model"
        budget = ", ".join(f"{name} {value}" for name, value in attack.options.items()) or "its own budget"
        prompts = attempts.n_prompts(config, attack)
        lines.append(f"Attack, {attack.name}: {prompts} harmful prompts, before and after, {models} ({budget}).")
    for probe in config.probes:
        lines.append(f"Probe, {probe.name}: {probe.n} {probe.role} prompts of {probe.prompts}, before and after.")
    return "\n".join(lines)


def table(run: Run) -> str:
    """Every cell and the stages it still needs, then the whole in numbers and, where rates are known, in hours."""
    lines = []
    for cell in run.cells:
        needs = [
            stage
            for stage, there in (
                ("align", cell.subject.weights.note.exists()),
                ("generate", cell.subject.folder.all_images.is_dir()),
                ("finetune", cell.folder.adapted.is_dir()),
                ("judge", cell.done),
            )
            if not there
        ]
        lines.append(f"{'done' if cell.done else 'missing: ' + ', '.join(needs):40} {cell.label}")
    for attempt in run.attempts:
        lines.append(f"{'done' if attempt.done else 'missing: ' + ', '.join(_needs(attempt)):40} {attempt.label}")
    for probe in run.probes:
        lines.append(f"{'done' if probe.done else 'missing: probe':40} {probe.label}")
    pictures = len(phase_jobs(run)) * (len(run.cells) + len(run.subjects))
    pictures += sum(attempts.n_prompts(run.config, a.settings) * run.config.prompts.images for a in run.attempts)
    pictures += sum(len(probe_stage.jobs(run, probe)) for probe in run.probes)
    tried = f"{len(run.attempts)} attacks on models, " if run.attempts else ""
    tried += f"{len(run.probes)} probes of models, " if run.probes else ""
    lines.append(f"{len(run.cells)} cells, {len(run.subjects)} subjects, {tried}{pictures} pictures in all.")
    return "\n".join([*lines, _estimate(missing(run), seconds_each(run))])


def _needs(attempt: Attempt) -> list[str]:
    """What an attempt that is not complete still needs."""
    there = {"attack": attempt.source.found.exists(), "generate": attempt.folder.all_images.is_dir(), "judge": False}
    return [stage for stage, done in there.items() if not done]


def unopened(config: Config, subjects: Sequence[str], workdir: Path) -> str:
    """As `table` for a run that cannot be opened: all its cells, done or not, and the whole work of these subjects.

    Which cells are done is not known without the files, since they are part of a cell's id. Rates are those of the
    complete cells in the work directory, whatever they are of.
    """
    counts, settings = whole(config, subjects), _settings(config, subjects)
    lines = [f"{'needs the files above':40} {cells.label(*setting)}" for setting in settings]
    models = len(settings) + len(subjects)
    tried = f"{len(config.attacks) * models} attacks on models, " if config.attacks else ""
    tried += f"{len(config.probes) * models} probes of models, " if config.probes else ""
    lines.append(f"{len(settings)} cells, {len(subjects)} subjects, {tried}{counts['picture']:.0f} pictures in all.")
    return "\n".join([*lines, _estimate(counts, _rates_of_complete(workdir), "In all")])


def whole(config: Config, subjects: Sequence[str]) -> Counts:
    """The work that a resolved config asks for with these subjects, as `missing` counts it, done or not."""
    prompts, settings = config.prompts, _settings(config, subjects)
    pictures = (prompts.n_harmful + prompts.n_benign) * prompts.images * (len(settings) + len(subjects))
    counts: Counts = defaultdict(float, align=len(subjects), picture=pictures)
    for _, _, profile, _ in settings:
        counts[f"step {profile}"] += num_steps(config.bft, profile, config.bft.samples)
    models = len(settings) + len(subjects)
    for attack in config.attacks:
        n = attempts.n_prompts(config, attack)
        counts["picture"] += n * prompts.images * models
        counts[f"prompt of {attack.name}"] += n * (1 if attack.transfer else models)
    counts["picture"] += sum(probe.n for probe in config.probes) * prompts.images * models
    return counts


def _settings(config: Config, subjects: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """Subject, scenario, profile and seed of every cell."""
    return list(product(subjects, config.bft.scenarios, config.bft.profiles, config.bft.seeds))


def _rates_of_complete(workdir: Path) -> Counts:
    """As `seconds_each`, from all complete cells of a work directory."""
    rates: dict[str, list[float]] = defaultdict(list)
    for folder in Workdir(workdir).complete_cells():
        cell = json.loads(folder.summary.read_text(encoding="utf-8"))
        for kind, rate in (("picture", "images_per_s"), (f"step {cell['profile']}", "steps_per_s")):
            if cell["rates"].get(rate):
                rates[kind].append(1 / cell["rates"][rate])
    return {kind: sum(seconds) / len(seconds) for kind, seconds in rates.items()}


def missing(run: Run) -> Counts:
    """Numbers of missing alignments, images, and fine-tuning steps by profile. A fine-tuning begun counts whole."""
    counts: Counts = defaultdict(float)
    bft = run.config.bft
    for subject in run.subjects:
        counts["align"] += not subject.weights.note.exists()
        counts["picture"] += _missing_pictures(subject.folder, "before", phase_jobs(run))
    for cell in run.cells:
        if not cell.done:
            counts["picture"] += _missing_pictures(cell.folder, "after", phase_jobs(run))
            if not cell.folder.adapted.is_dir():
                counts[f"step {cell.profile}"] += num_steps(bft, cell.profile, bft.samples)
    for attempt in run.attempts:
        if not attempt.done:
            counts["picture"] += _missing_attacked(run, attempt)
    for probe in run.probes:
        if not probe.done:
            counts["picture"] += _missing_pictures(probe.folder, probe.model.phase, probe_stage.jobs(run, probe))
    for attempt in _searches(a for a in run.attempts if not a.done):
        if not attempt.source.found.exists():
            counts[f"prompt of {attempt.settings.name}"] += attempts.n_prompts(run.config, attempt.settings)
    return {kind: count for kind, count in counts.items() if count}


def _missing_pictures(folder: ImagesFolder, phase: str, jobs: Iterable[Job]) -> int:
    return sum(not picture_path(folder, phase, *job).exists() for job in jobs)


def _searches(tried: Iterable[Attempt]) -> list[Attempt]:
    """One attempt of all that use the same finds, as those of a transferred attack do."""
    return list({attempt.source.name: attempt for attempt in tried}.values())


def _missing_attacked(run: Run, attempt: Attempt) -> int:
    """Missing images of an attempt; before it is made, as many as it asks for at most."""
    try:
        asked = found.images(run, attempt, found.read(attempt.source.found)).jobs
    except found.UNREADABLE:
        return attempts.n_prompts(run.config, attempt.settings) * run.config.prompts.images
    return _missing_pictures(attempt.folder, attempt.model.phase, asked)


def seconds_each(run: Run) -> Counts:
    """Seconds of wall time that one of each kind took so far in this work directory.

    Kinds that were never measured are left out.
    """
    seconds: Counts = defaultdict(float)
    count: Counts = defaultdict(float)

    def add(kind: str, times: dict[str, dict[str, float]], stage: str) -> None:
        if times.get(stage, {}).get("count"):
            seconds[kind] += times[stage]["seconds"]
            count[kind] += times[stage]["count"]

    for subject in run.subjects:
        add("align", read_times(subject.weights), "align")
        add("picture", read_times(subject.folder), "generate_before")
    for cell in run.cells:
        times = read_times(cell.folder)
        add("picture", times, "generate_after")
        add(f"step {cell.profile}", times, "finetune")
    looks: list[Attempt | Probing] = [*run.attempts, *run.probes]
    for one in looks:
        add("picture", read_times(one.folder), f"generate_{one.model.phase}")
    for attempt in _searches(run.attempts):
        add(f"prompt of {attempt.settings.name}", read_times(attempt.source), "attack")
    return {kind: seconds[kind] / count[kind] for kind in count}


def _estimate(counts: Counts, rates: Counts, which: str = "Missing") -> str:
    if not counts:
        return "Nothing is missing."
    lines = [f"{which}: {', '.join(f'{count:.0f} x {kind}' for kind, count in counts.items())}."]
    known = {kind: count * rates[kind] / 3600 for kind, count in counts.items() if kind in rates}
    if known:
        hours = sum(known.values())
        devices = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
        shares = ", ".join(f"{kind} {share:.2f}" for kind, share in known.items())
        lines.append(f"At the rates measured here: {hours:.2f} hours, {hours * devices:.2f} device-hours ({shares}).")
    unknown = [kind for kind in counts if kind not in rates]
    if unknown:
        lines.append(f"Not measured yet, so not in any estimate: {', '.join(unknown)}.")
    return "\n".join(lines)
