"""Tables that the paper does not have, each by name, from leaderboard rows alone.

harm: how h changes under each profile and in each scenario, in points. kept: the share of the safety gained that is
left, and whether the model still works. audit: the ranking under other choices of the score. drift: how soon half of
the safety gain is lost. attacks: prompts that attacks broke before and after fine-tuning. probes: images of further
prompt sets.
"""

from collections.abc import Callable, Iterator
from typing import Any

from spqr_jax.report.reading import ReportedRun, headline_rows, shown_profile
from spqr_jax.report.tabular import Figure, Table, TableRow, both_forms, figure_of, plain


def harm_tables(run: ReportedRun) -> list[Table]:
    """How h changes under each profile, with what fine-tuning does to the images, and how it changes by scenario."""
    rows = [row for row in headline_rows(run) if row.get("h_before") is not None and row.get("dh") is not None]
    rows = sorted(rows, key=lambda row: row["dh"])
    if not rows:
        return []
    return [_harm_by_profile(run, rows), *([_harm_by_scenario(run, rows)] if len(run.scenarios) > 1 else [])]


def _harm_by_profile(run: ReportedRun, headline: list[dict[str, Any]]) -> Table:
    scenario, profile = headline[0]["scenario"], shown_profile(headline[0]["profile"])
    under = {(row["subject"], row["profile"]): row for row in run.rows if row["scenario"] == scenario}
    rows: list[TableRow] = [
        [
            *(row["subject"], figure_of(row, "h_before", digits=1)),
            *(figure_of(under.get((row["subject"], name)), "dh", digits=1) for name in run.profiles),
            figure_of(row, "kept", digits=2),
            *(plain(row.get(f"clip_{phase}")) for phase in ("before", "after")),
            *(plain(row.get(f"fid_{phase}"), digits=1) for phase in ("before", "after")),
        ]
        for row in headline
    ]
    caption = (
        f"h, the share of harmful prompts with an unsafe image, before fine-tuning, and its change in points under "
        f"each profile, scenario {scenario}. Under profile {profile}: the share of the safety gained that is kept, "
        f"CLIP similarity and FID. From the smallest change under {profile} to the largest."
    )
    columns = ["Method", "h before, %", *(f"{shown_profile(name)}, points" for name in run.profiles), "Kept"]
    return Table("harm", caption, [*columns, "CLIP before", "CLIP after", "FID before", "FID after"], rows)


def _harm_by_scenario(run: ReportedRun, headline: list[dict[str, Any]]) -> Table:
    rows = _by_scenario(run, headline, "dh", digits=1)
    shown = {"h_after": ("h, %", 1), "clip_after": ("CLIP similarity", 3), "fid_after": ("FID", 1)}
    for control in (row for row in headline if row.get("is_control")):
        for key, (what, digits) in shown.items():
            (figures,) = _by_scenario(run, [control], key, digits=digits)
            rows.append([f"{control['subject']}, after: {what}", *figures[1:]])
    caption = (
        f"Change of h in points under profile {shown_profile(headline[0]['profile'])}, by scenario. The last rows show "
        "what the same fine-tuning does to the unaligned model: where that draws little, no harm can be seen."
    )
    return Table("harm_scenarios", caption, ["Method", *run.scenarios], rows)


def _by_scenario(run: ReportedRun, headline: list[dict[str, Any]], key: str, *, digits: int) -> list[TableRow]:
    """One figure of every subject in every scenario, under the profile of the rows in `headline`, in their order."""
    found = {(row["subject"], row["profile"], row["scenario"]): row for row in run.rows}

    def figures(row: dict[str, Any]) -> Iterator[Figure]:
        for scenario in run.scenarios:
            yield figure_of(found.get((row["subject"], row["profile"], scenario)), key, digits=digits)

    return [[row["subject"], *figures(row)] for row in headline]


def kept_tables(run: ReportedRun) -> list[Table]:
    """What is left of the safety gained; beside it the control after fine-tuning, and CLIP similarity. By scenario."""
    if not any(row.get("gain") is not None for row in run.rows):
        return []
    rows: list[TableRow] = [
        [
            *(row["subject"], row["scenario"], shown_profile(row["profile"])),
            *(figure_of(row, key, digits=1) for key in ("h_before", "gain", "h_after", "control_h_after")),
            *(figure_of(row, key) for key in ("kept", "clip_before", "clip_after")),
        ]
        for row in run.rows
        if not row.get("is_control")
    ]
    caption = (
        "What is left of the safety that aligning gained. Gain: h of the unaligned control minus h, before "
        "fine-tuning. Kept: the share of the control's harm that is prevented, after fine-tuning over before; 1: all "
        "of it, 0: as harmful as the control. A gap: the gain is not above zero by its interval, or the control draws "
        "hardly any harm any more. Where CLIP after is low, little is drawn of anything."
    )
    columns = ["Method", "Scenario", "Profile", "h before, %", "Gain, points", "h after, %", "Control's h after, %"]
    tables = [Table("kept", caption, [*columns, "Kept", "CLIP before", "CLIP after"], rows)]
    methods = [row for row in headline_rows(run) if not row.get("is_control")]
    if methods and len(run.scenarios) > 1:
        profile = shown_profile(methods[0]["profile"])
        caption = f"The share of the safety gained that is kept under profile {profile}, by scenario. A gap as above."
        lines = _by_scenario(run, methods, "kept", digits=2)
        tables.append(Table("kept_scenarios", caption, ["Method", *run.scenarios], lines))
    return tables


def audit_table(run: ReportedRun) -> list[Table]:
    """The rank of every subject under other choices of the score, and Kendall's tau against the reported ranking."""
    entries = run.leaderboard.get("audit") or []
    if not entries:
        return []
    subjects = [subject for subject in run.subjects if any(subject in entry["rank"] for entry in entries)]
    rows: list[TableRow] = [
        [
            *(entry["scenario"], entry["profile"], entry["choice"]),
            *(plain(entry["rank"].get(subject), digits=0) for subject in subjects),
            *(plain(entry["moved"], digits=0), plain(entry["tau"], digits=2)),
        ]
        for entry in entries
    ]
    caption = (
        "Rank of each method by SPQR as reported, and under other choices that the score leaves open, one at a time; "
        "moved: methods whose rank changes; tau: Kendall's rank correlation with the ranking as reported."
    )
    columns = ["Scenario", "Profile", "Choice", *(f"rank {subject}" for subject in subjects), "moved", "tau"]
    return [Table("audit", caption, columns, rows)]


def drift_table(run: ReportedRun) -> list[Table]:
    """Steps until half of the safety gain over the control is lost, where harmfulness was measured along the way."""
    rows: list[TableRow] = []
    for row in run.rows:
        if curve := row.get("drift_curve"):
            names = [row["subject"], row["profile"], row["scenario"]]
            rows.append([*names, plain(curve["h"][0], digits=1), plain(curve["h"][-1], digits=1), half_life(curve)])
    caption = (
        "Drift while fine-tuning: h at the first and last step measured, and the half-life of the safety gain over "
    )
    caption += "the unaligned control, in steps, linearly interpolated."
    columns = ["Method", "Profile", "Scenario", "h first, %", "h last, %", "Half-life, steps"]
    return [Table("drift", caption, columns, rows)] if rows else []


def attacks_table(run: ReportedRun) -> list[Table]:
    """Prompts broken before and after fine-tuning: without an attack, by each attack, and by any of them."""
    if not run.attacked:
        return []

    def lines(form: str) -> list[TableRow]:
        return [
            [
                *(row["subject"], shown_profile(row["profile"]), row["scenario"]),
                *(row["attack"], _made_on(row), str(row["n"])),
                *(figure_of(row, key, digits=1) for key in ("asr_before", "asr_after", "rise")),
                *(figure_of(row, key, form=form) for key in ("S", "R")),
                *(figure_of(row, key, digits=1) for key in ("reopened", "reopened_alone")),
                f"{row['undecided_before']}+{row['undecided_after']}",
            ]
            for row in run.attacked
        ]

    caption = (
        "Prompts with an unsafe image in percent, before and after fine-tuning, as they are, under each attack, and "
        "under any of them; S before and R (form) under attack, which enter no score; and of the prompts that held "
        "before, the percentage that the same attack broke after, and that fine-tuning broke without it. Undecided: "
        "prompts before+after, failed attacks among them."
    )
    shares = ["Broken before, %", "after, %", "Rise, points", "S", "R", "Reopened, %", "by fine-tuning alone, %"]
    columns = ["Method", "Profile", "Scenario", "Attack", "Made on", "Prompts", *shares, "Undecided"]
    return both_forms("attacks", caption, columns, lines)


def _made_on(row: dict[str, Any]) -> str:
    """The model that an attack reads, in words."""
    if row["kind"] != "attack":
        return "n/a"
    return "unaligned model" if row["transfer"] else "text encoder" if row["access"] == "text encoder" else "itself"


def probes_table(run: ReportedRun) -> list[Table]:
    """Unsafe images and CLIP similarity of further prompt sets, by set, and beside the unaligned control."""
    if not run.probed:
        return []
    digits = {"unsafe": 1, "dunsafe": 1, "clip": 3, "dclip": 3}
    rows: list[TableRow] = [
        [
            *(row["probe"], row["role"], row["subject"], row["phase"]),
            *(shown_profile(row["profile"]) if row["profile"] else "n/a", row["scenario"] or "n/a", str(row["n"])),
            *(figure_of(row, key, digits=places) for key, places in digits.items()),
            str(row["undecided"]),
        ]
        for row in run.probed
    ]
    caption = (
        "Further prompt sets before and after fine-tuning: unsafe images in percent, CLIP similarity where the role is "
        "benign, and both minus the unaligned control's, paired. They enter no score. Undecided: images."
    )
    columns = ["Probe", "Role", "Method", "Phase", "Profile", "Scenario", "Prompts"]
    columns += ["Unsafe, %", "minus control's", "CLIP", "CLIP minus control's", "Undecided"]
    return [Table("probes", caption, columns, rows)]


def half_life(curve: dict[str, Any]) -> str:
    """The half-life of a drift curve with its interval as text. An end beyond the last step s reads ">s"."""
    last = f">{curve['steps'][-1]}"
    if curve["reached"] is None:
        return "n/a"
    value = f"{curve['half_life']:.1f}" if curve["reached"] else last
    low, high = (last if end is None else f"{end:.1f}" for end in curve["half_life_ci"])
    return f"{value} [{low}, {high}]"


TABLES: dict[str, Callable[[ReportedRun], list[Table]]] = {
    "harm": harm_tables,
    "kept": kept_tables,
    "audit": audit_table,
    "drift": drift_table,
    "attacks": attacks_table,
    "probes": probes_table,
}
