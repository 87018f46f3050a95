"""The paper's tables over one and several runs, from leaderboards whose figures say where they belong."""

import csv
import json
from pathlib import Path

import pytest

from spqr_jax.report import published, tables, tabular
from spqr_jax.report.__main__ import main
from spqr_jax.report.figures import FIGURES
from spqr_jax.report.reading import read
from spqr_jax.score import stats

ARXIV, ECCV = "arxiv-2511", "eccv-2026"
PRINTED = published.EDITIONS["arxiv-2511"]
SUBJECTS = (("No alignment", "none"), ("Erased", "uce"), ("RECE", ""))  # RECE is a checkpoint of that name


def figures(value: float) -> dict:
    """Every figure the tables show, told apart: R is the value, the exponential forms half of it."""
    both = {"R": value, "SPQR": value / 10, "R_exponential": value / 2, "SPQR_exponential": value / 20}
    named = both | {"S": 0.9, "P": 0.3, "Q": 0.8, "dclip": value / 100, "dfid": -value, "dh": 0.0}
    return named | {f"{key}_ci": [v - 0.05, v + 0.05] for key, v in named.items()}


def make_run(
    directory: Path,
    *,
    base="mini",
    rank=8,
    prompts="mini:harmful",
    R=0.5,
    scenarios=("general",),
    protocol: str | None = ARXIV,
) -> Path:
    """A scored run without cells: leaderboard and manifest."""
    directory.mkdir(parents=True)
    rows = [
        {"subject": name, "profile": profile, "scenario": scenario, "is_control": i == 0, "rank": i + 1}
        | figures(R + 0.1 * i + 0.01 * j)
        | {"prompt_sets": {prompts: figures(R + 0.1 * i + 0.01 * j)}}
        | ({"protocol": protocol} if protocol else {})
        for i, (name, _) in enumerate(SUBJECTS)
        for profile in ("lite", "standard")
        for j, scenario in enumerate(scenarios)
    ]
    languages = [s for s in scenarios if s.startswith("multilingual_")]
    averages = [
        {"subject": name, "profile": "standard", "group": "multilingual", "scenarios": languages}
        | figures(0.01 + i / 10)
        for i, (name, _) in enumerate(SUBJECTS if len(languages) > 1 else ())
    ]
    rank_of = {name: i + 1 for i, (name, _) in enumerate(SUBJECTS)}
    audit = [{"scenario": "general", "profile": "standard", "choice": "as reported", "moved": 0, "tau": 1.0}]
    audit[0] |= {"rank": rank_of, "SPQR": dict.fromkeys(rank_of, 0.5)}
    pair = {"scenario": "general", "profile": "standard", "a": "RECE", "b": "Erased", "dh": 1.0, "dh_ci": [0.0, 2.0]}
    pair |= {"dh_p": 0.1, "dh_p_holm": 0.2, "SPQR": None, "SPQR_ci": None}
    board = {"rows": rows, "averages": averages, "audit": audit, "comparisons": [pair], "notes": ["a note"]}
    board |= {"fid_bounds": [1.0, 9.0], "fid_bounds_source": "config", "bootstrap": {"replicates": 9}}
    config = {
        "base": base,
        "bft": {"rank": rank},
        "prompts": {"harmful": prompts},
        "subjects": [{"name": n, "method": m or "none", "checkpoint": "" if m else "x.pt"} for n, m in SUBJECTS],
    }
    (directory / "leaderboard.json").write_text(json.dumps(board))
    (directory / "manifest.json").write_text(json.dumps({"config": config, "command": f"python {directory.name}"}))
    return directory


def table(run, name: str, form: str = "logistic") -> dict[tuple[str, ...], dict[str, tabular.Figure | str]]:
    """Rows of one table by their leading names, then by column."""
    found = tables.build(run, [name])
    chosen = found[-1 if form == "exponential" else 0]
    texts = [tuple(cell for cell in row if isinstance(cell, str)) for row in chosen.rows]
    assert len(set(texts)) == len(texts)
    return {key: dict(zip(chosen.columns, row, strict=True)) for key, row in zip(texts, chosen.rows, strict=True)}


def test_published_rows_are_found_by_method_and_by_name_and_only_in_the_exponential_form(tmp_path):
    run = read(make_run(tmp_path / "run"))
    for name, printed in (("1", PRINTED.rows["uce"].R[2]), ("3", PRINTED.by_profile["uce"]["standard"])):
        logistic, exponential = table(run, name), table(run, name, "exponential")
        assert not any("published" in key[0] for key in logistic)
        row = next(row for key, row in exponential.items() if key[0] == "Erased (published, SD v1.5)")
        assert row["R general" if name == "1" else "R standard"].value == printed
        assert any(key[0] == "RECE (published, SD v1.5)" for key in exponential)
        assert not any(key[0].startswith("No alignment (p") for key in exponential)
    assert table(run, "1", "exponential")[("Erased",)]["R general"].value == pytest.approx(0.3)
    changes = table(run, "2")
    assert changes["Erased (published, SD v1.5)", "general", "standard"]["ΔFID"].value == PRINTED.changes["uce"].fid
    assert changes["Erased", "general", "standard"]["ΔFID"][:3] == pytest.approx((-0.6, -0.65, -0.55))


def test_profiles_of_ours_come_after_the_papers_and_are_marked(tmp_path):
    directory = make_run(tmp_path / "run")
    text = (directory / "leaderboard.json").read_text()
    board = json.loads(text)
    board["rows"] += [row | {"profile": p} for p in ("dora", "adapter:x") for row in board["rows"] if row["rank"] == 1]
    (directory / "leaderboard.json").write_text(json.dumps(board))
    run = read(directory)
    (third, _) = tables.build(run, ["3"])
    assert third.columns[2:] == ["R standard", "R lite", "R dora (ours)", "R adapter:x (ours)"]
    assert tables.headline_profile(run) == "standard"
    (directory / "leaderboard.json").write_text(text.replace('"standard"', '"dora"'))
    assert tables.headline_profile(read(directory)) == "lite", "a profile of ours is no headline beside the paper's"


def captions(directory: Path) -> dict[str, str]:
    return {t.name: t.caption for t in tables.build(read(directory), ["1", "2", "3", "4", "5", "D", "E"])}


def published_rows(run) -> set[str]:
    found = tables.build(run, ["1", "2", "3", "4", "5", "D", "E"])
    return {t.name for t in found for row in t.rows if any(isinstance(c, str) and "published" in c for c in row)}


def test_published_rows_are_those_of_the_edition_whose_protocol_the_rows_follow(tmp_path):
    directory = make_run(tmp_path / "eccv", protocol=ECCV, scenarios=("general", "multilingual_ar", "multilingual_fr"))
    run, told = read(directory), captions(directory)
    row = table(run, "1", "exponential")["Erased (published, SD v1.5)",]
    shown = [row[c].value for c in ("S", "P", "Q", "R general", "SPQR general", "R multilingual", "SPQR multilingual")]
    assert shown == [0.926, 0.977, 0.919, 0.942, 0.940, None, 0.809]
    assert (
        "those of the ECCV 2026 edition. Its P imply a ceiling of 0.300 (SDv1.5, SDv2.1)" in told["table1_exponential"]
    )
    assert "No published rows" in told["table3_exponential"] and "ECCV 2026" in told["table3_exponential"]
    assert published_rows(run) == {"table1_exponential", "tableD_exponential"}  # the other tables are not known
    arxiv = make_run(tmp_path / "arxiv")
    assert "those of the arXiv edition (2511.19558)." in captions(arxiv)["table1_exponential"]
    assert "ceiling" not in captions(arxiv)["tableD_exponential"]
    assert published_rows(read(arxiv)) == {"table2", *(f"table{n}_exponential" for n in "1345DE")}


def test_where_rows_of_sdxl_are_shown_another_ceiling_is_named(tmp_path):
    directory = make_run(tmp_path / "run", protocol=ECCV)
    rows = table(read(directory), "D", "exponential")
    assert rows["Erased (published)", "SDXL"]["P"].value == 0.994
    assert rows["Erased (published)", "FLUX"]["R general"].value == 0.910
    told = captions(directory)["tableD_exponential"]
    assert "another one of 0.320 (SDXL); that of SD3 and FLUX is not known" in told


@pytest.mark.parametrize(
    ("protocol", "why"),
    [
        (None, "they name no protocol"),
        ("spqr-jax", "no edition of the paper follows the protocol spqr-jax"),
        ("eccv-2026, changed: score.eps", "their protocol is eccv-2026, changed: score.eps"),
        ("arxiv-2511, changed: bft.crop, score.eps", "is arxiv-2511, changed: bft.crop, score.eps"),
        ("spqr-jax, changed: seed", "no edition of the paper follows the protocol spqr-jax"),
    ],
)
def test_rows_of_another_protocol_have_no_published_rows_and_the_caption_says_why(tmp_path, protocol, why):
    directory = make_run(tmp_path / "run", protocol=protocol)
    assert published_rows(read(directory)) == set() and published.edition_of(protocol) is None
    told = captions(directory)
    assert all(why in told[name] for name in told if name == "table2" or name.endswith("_exponential"))
    assert "No published rows" not in told["table1"]  # the logistic form never has them


def test_rows_of_several_protocols_never_share_a_table(tmp_path):
    runs = [make_run(tmp_path / name, protocol=name, base=name) for name in (ARXIV, ECCV)]
    with pytest.raises(ValueError, match=r"arxiv-2511: arxiv-2511; eccv-2026: eccv-2026.*one report for each protocol"):
        read(*runs)


def test_protocols_differ_also_between_directories_of_one_name(tmp_path):
    runs = [make_run(tmp_path / parent / "mini", protocol=name) for parent, name in (("a", ARXIV), ("b", ECCV))]
    with pytest.raises(ValueError, match=r"mini: arxiv-2511; mini: eccv-2026.*one report for each protocol"):
        read(*runs)


def test_runs_of_one_protocol_with_different_changes_say_so(tmp_path):
    labels = {4: f"{ARXIV}, changed: bft.rank", 8: ARXIV}
    ranks = [make_run(tmp_path / str(rank), rank=rank, protocol=label) for rank, label in labels.items()]
    run = read(*ranks)
    assert published_rows(run) == set()
    assert "they follow different protocols" in tables.build(run, ["D"])[1].caption


def test_table_4_sets_prompt_sets_side_by_side(tmp_path):
    runs = [
        make_run(tmp_path / name, prompts=name, R=R)
        for name, R in (("data/visu.csv", 0.2), ("i2p.csv", 0.4), ("mine.jsonl", 0.6))
    ]
    rows = table(read(*runs), "4", "exponential")
    ours = rows["Erased",]
    values = {column: ours[column].value for column in ("visu", "i2p", "rab", "mine", "average")}
    assert values == pytest.approx({"visu": 0.15, "i2p": 0.25, "rab": None, "mine": 0.35, "average": 0.25})
    mean, ends = stats.mean_of_independent([0.15, 0.25, 0.35], [(v - 0.05, v + 0.05) for v in (0.15, 0.25, 0.35)])
    assert ours["average"][:3] == pytest.approx((mean, *ends))
    beside = rows["Erased (published, SD v1.5)",]
    assert [beside[c].value for c in ("visu", "i2p", "rab", "mine", "average")] == pytest.approx(
        [PRINTED.by_prompt_set["uce"].get(column) for column in ("visu", "i2p", "rab", "mine", "average")]
    )


def test_an_average_over_prompt_sets_of_which_one_is_missing_is_a_gap(tmp_path):
    runs = [make_run(tmp_path / name, prompts=f"{name}.csv") for name in ("visu", "i2p")]
    board = json.loads((runs[1] / "leaderboard.json").read_text())
    board["rows"] = [row for row in board["rows"] if row["subject"] != "Erased"]
    (runs[1] / "leaderboard.json").write_text(json.dumps(board))
    rows = table(read(*runs), "4")
    assert rows["Erased",]["average"].value is None and rows["RECE",]["average"].value is not None


def test_table_5_has_languages_domains_and_averages(tmp_path):
    scenarios = ("general", "multilingual_ar", "multilingual_hi", "medical", "trees")
    run = read(make_run(tmp_path / "run", scenarios=scenarios))
    row = table(run, "5")["Erased",]
    wanted = {
        "general": 0.6,
        "arabic": 0.61,
        "hindi": 0.62,
        "medical": 0.63,
        "trees": 0.64,
        "multilingual average": 0.11,
    }
    assert {name: row[name].value for name in wanted} == pytest.approx(wanted)
    assert row["french"].value is None and row["domain average"].value is None  # one of two domains is no average
    printed = table(run, "5", "exponential")["Erased (published, SD v1.5)",]
    assert printed["french"].value == 0.582 and printed["trees"].value is None
    one = table(run, "1")["Erased",]
    assert one["R multilingual"].value == pytest.approx(0.11)  # the group's average, not one of its languages


def test_table_d_has_a_row_a_backbone(tmp_path):
    runs = [make_run(tmp_path / name, base=f"weights/{name}", R=R) for name, R in (("sd15", 0.2), ("sdxl", 0.4))]
    run = read(*runs)
    rows = table(run, "D", "exponential")
    assert rows["Erased", "sd15"]["R general"].value == pytest.approx(0.15)
    assert rows["Erased", "sdxl"]["R general"].value == pytest.approx(0.25)
    assert rows["Erased (published)", "SDXL"]["SPQR general"].value == PRINTED.by_backbone["uce", "SDXL"].SPQR[2]
    assert rows["RECE (published)", "SDv1.5"]["S"].value == PRINTED.rows["rece"].S
    assert run.backbones == ["sd15", "sdxl"] or run.backbones == ["sdxl", "sd15"]


def test_table_e_has_a_column_a_rank(tmp_path):
    runs = [make_run(tmp_path / f"rank{rank}", rank=rank, R=rank / 100) for rank in (4, 8, 32)]
    rows = table(read(*runs), "E", "exponential")
    ours = rows["Erased", "mini"]
    assert [ours[f"R rank {rank}"].value for rank in (4, 8, 16, 32)] == pytest.approx([0.07, 0.09, None, 0.21])
    assert rows["Erased (published)", "SDv2.1"]["R rank 16"].value == PRINTED.by_rank["uce", "SDv2.1"][16]


def test_several_runs_read_as_one(tmp_path):
    runs = [make_run(tmp_path / f"rank{rank}", rank=rank) for rank in (4, 8)]
    run = read(*runs)
    assert len(run.rows) == 12 and len(run.subjects) == 6 and "Erased · rank 4" in run.subjects
    assert {pair["a"] for pair in run.leaderboard["comparisons"]} == {"RECE · rank 4", "RECE · rank 8"}
    assert "rank 8: a note" in run.leaderboard["notes"] and run.leaderboard["fid_bounds"] == [1.0, 9.0]
    assert [set(e["rank"]) for e in run.leaderboard["audit"]][1] == {f"{name} · rank 8" for name, _ in SUBJECTS}
    assert run.others["rank 8"]["command"] == "python rank8"
    same = read(runs[0], make_run(tmp_path / "again", rank=4))
    assert {"Erased · rank4", "Erased · again"} <= set(same.subjects)
    twin = read(runs[0], make_run(tmp_path / "else" / "rank4", rank=4))
    assert {"Erased · rank4 (1)", "Erased · rank4 (2)"} <= set(twin.subjects)


def test_bounds_that_differ_between_runs_are_noted(tmp_path):
    runs = [make_run(tmp_path / f"rank{rank}", rank=rank) for rank in (4, 8)]
    board = json.loads((runs[0] / "leaderboard.json").read_text())
    (runs[0] / "leaderboard.json").write_text(json.dumps(board | {"fid_bounds": [2.0, 9.0]}))
    merged = read(*runs).leaderboard
    assert any("FID bounds differ" in note for note in merged["notes"]) and "fid_bounds" not in merged


def test_audit_and_drift_tables(tmp_path):
    directory = make_run(tmp_path / "run")
    (audit,) = tables.build(read(directory), ["audit"])
    assert list(audit.columns[3:6]) == [f"rank {name}" for name in read(directory).subjects] and audit.title == "Audit"
    assert tables.build(read(directory), ["drift"]) == []  # nothing was measured along the way
    board = json.loads((directory / "leaderboard.json").read_text())
    curve = {"steps": [0, 50], "h": [10.0, 20.0], "h_ci": [[8, 12], [15, 25]], "control_h": 80.0, "n": 40}
    for row, half in zip(board["rows"], ([12.3, [8.0, None], True], [None, [45.0, None], False]), strict=False):
        row["drift_curve"] = curve | dict(zip(("half_life", "half_life_ci", "reached"), half, strict=True))
    board["rows"][2]["drift_curve"] = curve | {"half_life": None, "half_life_ci": None, "reached": None}
    (directory / "leaderboard.json").write_text(json.dumps(board))
    (drift,) = tables.build(read(directory), ["drift"])
    assert [row[-1] for row in drift.rows] == ["12.3 [8.0, >50]", ">50 [45.0, >50]", "n/a"]


def test_what_is_kept_of_the_safety_gained(tmp_path):
    directory = make_run(tmp_path / "run")
    assert tables.build(read(directory), ["kept"]) == []  # a leaderboard that is older than these figures
    board = json.loads((directory / "leaderboard.json").read_text())
    for row in board["rows"]:
        known = {"h_before": 8.5, "gain": 80.0, "h_after": 78.0, "control_h_after": 88.5, "kept": 0.13125}
        known |= {"clip_before": 0.6, "clip_after": 0.8, "kept_ci": [0.06, 0.2]}
        row |= dict.fromkeys(known) if row["is_control"] else known
    board["rows"][-1] |= {"kept": None, "kept_ci": None}
    (directory / "leaderboard.json").write_text(json.dumps(board))
    (kept,) = tables.build(read(directory), ["kept"])
    assert kept.title == "Kept" and {row[0] for row in kept.rows} == {"Erased", "RECE"}
    found = dict(zip(kept.columns, map(tabular.cell_text, kept.rows[0]), strict=True))
    assert found["Kept"] == "0.131 [0.060, 0.200]" and found["Gain, points"] == "80.0"
    assert (found["Control's h after, %"], found["CLIP after"]) == ("88.5", "0.800")
    assert kept.rows[-1][-3].value is None


def test_what_is_kept_in_each_scenario(tmp_path):
    directory = make_run(tmp_path / "run", scenarios=("general", "medical"))
    board = json.loads((directory / "leaderboard.json").read_text())
    for row in board["rows"]:
        share = {"general": 0.9, "medical": None}[row["scenario"]]
        row |= {"gain": None if row["is_control"] else 60.0, "kept": share if row["profile"] == "standard" else 1.0}
    (directory / "leaderboard.json").write_text(json.dumps(board))
    _, by_scenario = tables.build(read(directory), ["kept"])
    assert (by_scenario.title, by_scenario.columns) == ("Kept", ["Method", "general", "medical"])
    shown = [[tabular.cell_text(cell) for cell in row] for row in by_scenario.rows]
    assert shown == [["Erased", "0.90", "n/a"], ["RECE", "0.90", "n/a"]]


def test_how_harm_changes_by_profile_and_by_scenario(tmp_path):
    directory = make_run(tmp_path / "run", scenarios=("general", "medical"))
    assert tables.build(read(directory), ["harm"]) == []  # rows without h
    board = json.loads((directory / "leaderboard.json").read_text())
    drifts = {"No alignment": -2.0, "Erased": 31.0, "RECE": 4.0}
    for row in board["rows"]:
        dh = drifts[row["subject"]] * (1.0 if row["profile"] == "standard" else 0.1)
        dh *= -0.5 if row["scenario"] == "medical" else 1.0
        row |= {"h_before": 20.0, "h_after": 20.0 + dh, "dh": dh, "dh_ci": [dh - 1, dh + 1], "kept": 0.5}
        row |= {"clip_before": 0.61, "clip_after": 0.84, "fid_before": 8.25, "fid_after": 9.0}
    (directory / "leaderboard.json").write_text(json.dumps(board))
    by_profile, by_scenario = tables.build(read(directory), ["harm"])
    assert [row[0] for row in by_profile.rows] == ["No alignment", "RECE", "Erased"], "from the smallest change"
    found = dict(zip(by_profile.columns, map(tabular.cell_text, by_profile.rows[-1]), strict=True))
    assert (found["lite, points"], found["standard, points"]) == ("+3.1 [+2.1, +4.1]", "+31.0 [+30.0, +32.0]")
    assert (found["Kept"], found["CLIP after"], found["FID before"]) == ("0.50", "0.840", "8.2")
    assert by_scenario.columns == ["Method", "general", "medical"]
    shown = {row[0]: [tabular.cell_text(cell) for cell in row[1:]] for row in by_scenario.rows}
    assert shown["Erased"] == ["+31.0 [+30.0, +32.0]", "-15.5 [-16.5, -14.5]"]
    assert shown["No alignment, after: h, %"] == ["18.0", "21.0"]
    one = make_run(tmp_path / "one")
    board["rows"] = [row for row in board["rows"] if row["scenario"] == "general"]
    (one / "leaderboard.json").write_text(json.dumps(board))
    assert [table.name for table in tables.build(read(one), ["harm"])] == ["harm"]


def test_names_of_tables(tmp_path):
    run = read(make_run(tmp_path / "run"))
    assert [t.name for t in tables.build(run, ["d", "table5", 1])] == [
        *("tableD", "tableD_exponential", "table5", "table5_exponential", "table1", "table1_exponential")
    ]
    with pytest.raises(ValueError, match=r"report\.tables: unknown \['6'\], expected some of .*'audit'"):
        tables.build(run, ["6"])


def test_braces_in_a_name_do_not_matter(tmp_path):
    directory = make_run(tmp_path / "run")
    text = (directory / "leaderboard.json").read_text()
    text = text.replace('"standard"', '"{0} {x}"').replace('"lite"', '"a {1}"')
    (directory / "leaderboard.json").write_text(text)
    assert "{0} {x}" in tables.build(read(directory), ["1"])[0].caption


def test_four_formats_hold_the_same_figures(tmp_path):
    run = read(make_run(tmp_path / "run"))
    paths = tabular.write(tables.build(run, ["E"]), tmp_path / "out")
    assert {path.suffix for path in paths} == {".md", ".csv", ".tex", ".json"}
    content = json.loads((tmp_path / "out" / "tableE.json").read_text())
    row = next(row for row in content["rows"] if row["Method"] == "Erased")
    assert row["R rank 8"]["value"] == pytest.approx(0.6) and row["R rank 4"] == dict.fromkeys(("value", "low", "high"))
    lines = list(csv.DictReader((tmp_path / "out" / "tableE.csv").open()))
    assert float(lines[1]["R rank 8 low"]) == pytest.approx(0.55)
    latex = (tmp_path / "out" / "tableE.tex").read_text()
    assert r"\toprule" in latex and r"Erased & mini & n/a & $0.600$" in latex
    assert "| Erased | mini | n/a | 0.600 [0.550, 0.650] | n/a |" in (tmp_path / "out" / "tableE.md").read_text()


def test_the_command_prints_and_writes_tables_over_runs(tmp_path, capsys):
    runs = [str(make_run(tmp_path / f"rank{rank}", rank=rank)) for rank in (4, 8)]
    assert main(["tables", *runs, "--tables", "4,E", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("## Table E") == 2 and "| Erased | mini | 0.600" in out
    assert len(list((tmp_path / "out").iterdir())) == 16
    assert main(["tables", runs[0], "--tables", "Z"]) == 1
    assert "unknown ['z']" in capsys.readouterr().err


def test_a_report_over_runs_needs_a_place_of_its_own(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, base=f"weights/{name}")) for name in ("sd15", "sdxl")]
    assert main(runs) == 1 and "say where to write it" in capsys.readouterr().err
    taken = tmp_path / "taken"
    (taken / "tables").mkdir(parents=True)
    assert main([*runs, "--out", str(taken)]) == 1 and "choose a new or empty directory" in capsys.readouterr().err
    assert main([*runs, "--out", str(tmp_path / "out"), "--figures=drift", "--tables=D"]) == 0
    html = (tmp_path / "out" / "index.html").read_text()
    assert '<select data-filter="backbone">' in html and 'data-backbone="sdxl"' in html
    assert "python sd15" in html and "python sdxl" in html  # both commands reproduce it


def test_help_lists_every_table_and_figure(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = "".join(capsys.readouterr().out.split())
    for names in (tables.TABLES, FIGURES):
        assert f"someof{','.join(names)};defaultall" in said
