"""The report on a synthetic work directory: what is untrusted stays text, what is missing is a marked gap."""

import base64
import csv
import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import Markup
from PIL import Image

from spqr_jax import report
from spqr_jax.report import figures, gallery, svg, tables, tabular
from spqr_jax.report.agreement import of_pair
from spqr_jax.report.facts import cost
from spqr_jax.report.reading import PairKey, read
from spqr_jax.score import leaderboard

SCRIPT = "<script>alert(1)</script>"
NASTY_ID = "../../a\"b'<img src=x onerror=alert(2)>"
SUBJECTS = ("none", "uce", "esd <i>$x$</i>")
PROFILES = ("lite", "moderate", "standard")
CATEGORIES = ("weapons", "blood", "drugs", "insults", "fire & smoke")
PROMPTS = 10


def make_workdir(root: Path, *, scenarios=("general", "multilingual"), size=32, seed=0) -> Path:
    """A finished work directory with invented but consistent verdicts; deterministic."""
    rng = np.random.default_rng(seed)
    cells = []
    for subject in SUBJECTS:
        before = _phase(subject, "before", 0.9 if subject == "none" else 0.2, rng)
        for i, (profile, scenario) in enumerate(product(PROFILES, scenarios)):
            after = _phase(subject, "after", 0.95 if subject == "none" else 0.3 + 0.1 * i, rng)
            cells.append(_write_cell(root, subject, profile, scenario, before + after, size))
    rows = [_row(name, subject, profile, scenario) for name, subject, profile, scenario in cells]
    rows.sort(key=lambda row: -row["SPQR"])
    pair = {"a": "uce", "b": "none", "profile": "lite", "scenario": "general", "dh": 2.75, "dh_ci": [-1.0, 6.5]}
    pair |= {"dh_p": 0.02, "dh_p_holm": 0.0001, "SPQR": None, "SPQR_ci": None}
    board = {
        "rows": rows,
        "comparisons": [pair],
        "fid_bounds": [10.0, 60.0],
        "fid_bounds_source": "rows",
        "bootstrap": {"replicates": 1000, "seed": 0, "method": "percentile"},
        "notes": ["a note with <b>markup</b>"],
    }
    manifest = {
        "config": {"bft": {"steps": 100}},
        "versions": {"jax": "0.0", "numpy": np.__version__},
        "devices": ["cpu"],
        "command": "python launch.py --config configs/mini.py",
        "sha256": {"weights": "0" * 64},
        "judges": {"fid": {"network": "mini features", "dimensions": 64}},
        "mini": {"category": {c: {"accuracy": 0.98, "pictures": 60} for c in CATEGORIES}, "style": {"noto": 0.99}},
    }
    (root / "leaderboard.json").write_text(json.dumps(board))
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def _phase(subject: str, phase: str, unsafe: float, rng) -> list[dict]:
    rows = []
    for role, i in product(("harmful", "benign"), range(PROMPTS)):
        prompt = SCRIPT if i == 0 else f"an emoji of {role} thing {i} on a blue background"
        bad = role == "harmful" and bool(rng.random() < unsafe)
        verdict = "undecided" if role == "harmful" and i == 7 else "unsafe" if bad else "safe"
        judges = {
            "harm": {"verdict": verdict, "score": 0.9, "labels": {SCRIPT: 0.5}},
            "second": {"verdict": "unsafe" if bad and i % 2 else "safe"},
        }
        rows.append(
            {
                "phase": phase,
                "role": role,
                "prompt_set": role,
                "prompt_id": NASTY_ID if i == 0 else f"p{i}",
                "k": 0,
                "prompt": prompt,
                "category": CATEGORIES[i % 5] if role == "harmful" else "",
                "language": "en",
                "image_seed": i,
                "judges": json.dumps(judges),
                "verdict": verdict,
                "clip_score": 0.3 if role == "benign" else math.nan,
            }
        )
    return rows


def _write_cell(root: Path, subject: str, profile: str, scenario: str, rows: list[dict], size: int) -> tuple:
    name = f"{SUBJECTS.index(subject)}={profile}_{scenario}"  # "=": must not be read as a partition
    cell = root / "cells" / name
    names = {"cell": name, "subject": subject, "profile": profile, "scenario": scenario, "seed": 0}
    records = []
    for i, row in enumerate(rows):
        image = f"images/{row['phase']}_{row['role']}/{i}.png"
        (cell / image).parent.mkdir(parents=True, exist_ok=True)
        _picture(i % 20, SUBJECTS.index(subject), row["phase"], size).save(cell / image)
        records.append(names | row | {"image": image})
    pq.write_table(pa.Table.from_pylist(records), cell / "records.parquet")
    info = names | {
        "is_control": subject == "none",
        "n_undecided": 2,
        "rates": {"images_per_s": 14.2, "steps_per_s": 3.1, "judge_images_per_s": 250.0},
        "seconds": {"generate": 3.5, "finetune": 8.0, "judge": 0.4},
        "finetune": {"steps": 100, "trained_parameters": 12345},
        "judges": {"harm": {"name": "mini harm", "sha256": "1" * 64}, "second": {"name": "second"}},
    }
    (cell / "cell.json").write_text(json.dumps(info))
    return name, subject, profile, scenario


def _picture(i: int, subject: int, phase: str, size: int) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    picture = np.zeros((size, size, 3), np.uint8) + np.array([90 + 8 * i, 200 - 7 * i, 60 + 50 * subject], np.uint8)
    disc = x**2 + y**2 < (0.1 if phase == "before" else 0.06)
    picture[disc] = [250, 230 - 10 * i, 40]
    return Image.fromarray(picture)


def _row(name: str, subject: str, profile: str, scenario: str) -> dict:
    s, p = SUBJECTS.index(subject), PROFILES.index(profile)
    h_before, h_after = (90.0, 92.0) if s == 0 else (20.0 / s, 20.0 / s + 3.0 * (p + 1) + 0.25 * len(scenario))
    dh = h_after - h_before
    figures_ = {"S": 1 - h_before / 100, "P": 0.29 - 0.01 * s, "Q": 0.95 - 0.3 * s, "R": 1 / (1 + math.exp(dh))}
    figures_ |= {"R_exponential": math.exp(-max(dh, 0) / 10)}
    shared = [figures_[axis] for axis in "SPQ"]
    figures_["SPQR"] = 4 / sum(1 / v for v in [*shared, figures_["R"]])
    figures_["SPQR_exponential"] = 4 / sum(1 / v for v in [*shared, figures_["R_exponential"]])
    figures_ |= {"h_before": h_before, "h_after": h_after, "dh": dh, "clip_before": 0.29, "clip_after": 0.30}
    figures_ |= {"fid_before": 20.0 + 10 * s, "fid_after": 18.0 + 10 * s, "dclip": 0.01, "dfid": -2.0}
    intervals = {f"{key}_ci": [value - abs(value) * 0.08, value + abs(value) * 0.08] for key, value in figures_.items()}
    categories = {
        c: {"h_before": h_before, "h_after": h_after - i, "dh": dh - i, "S": figures_["S"] - 0.1 * i * figures_["S"]}
        | {"R": figures_["R"], "R_exponential": figures_["R_exponential"], "n": 20}
        for i, c in enumerate(CATEGORIES)
    }
    judges = {j: {"h_before": h_before, "h_after": h_after} for j in ("harm", "second")}
    counts = {"n_harmful": 10, "n_benign": 10, "undecided_before": 1, "undecided_after": 1, "seeds": [0]}
    names = {"subject": subject, "profile": profile, "scenario": scenario, "is_control": s == 0}
    names |= {"dh_variance": {"prompt": 9.0, "image_noise": None, "seed": 4.0, "residual": 1.0}}
    curve = {"steps": [0, 50, 100], "h": [h_before, h_before + dh / 2, h_after], "n": 10, "control_h": 90.0}
    curve |= {"h_ci": [[h - 2, h + 2] for h in curve["h"]], "half_life": 40.0, "half_life_ci": [30.0, None]}
    names |= {"drift_curve": curve | {"reached": True} if (s, profile) == (1, "standard") else None}
    names |= {"protocol": "arxiv-2511"}
    names |= {"rank": s + 1, "rank_ci": [1, 3], "languages": {"en": {"h_before": h_before, "n": 10}}}
    return names | figures_ | intervals | counts | {"categories": categories, "judges": judges}


class Page(HTMLParser):
    """Tags with attributes, and the text outside style and script."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text.append(data)

    def all(self, tag: str, class_: str = "") -> list[dict]:
        return [a for t, a in self.tags if t == tag and class_ in ["", *(a.get("class") or "").split()]]


def write(root: Path, **options) -> Path:
    """The report without its slow part, the figures."""
    return report.write(root, **{"figures": [], "prompts": 12} | options)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    root = make_workdir(tmp_path_factory.mktemp("run"))
    report.write(root)
    return root


@pytest.fixture(scope="module")
def page(workdir) -> Page:
    return Page((workdir / "report" / "index.html").read_text())


def edit(root: Path, change) -> None:
    """Apply `change` to the leaderboard in place."""
    path = root / "leaderboard.json"
    board = json.loads(path.read_text())
    change(board)
    path.write_text(json.dumps(board))


def test_untrusted_text_stays_text(page):
    assert len(page.all("script")) == 1  # ours
    assert any(SCRIPT in text for text in page.text)
    assert any(NASTY_ID in text for text in page.text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not page.all("i") or all(a.get("class") in ("ring", "disc") for a in page.all("i"))  # the subject's <i>
    assert {a["src"][:15] for a in page.all("img")} == {"data:image/png;"}


def test_policy_allows_only_our_style_and_script_and_nothing_from_a_network(workdir, page):
    html = (workdir / "report" / "index.html").read_text()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        body = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in page.tags)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href") and v]
    assert not any(link.startswith(("http:", "https:", "//")) for link in links)


def test_every_row_and_every_category_is_on_the_leaderboard(page):
    rows = [a for a in page.all("tr") if "data-slice" in a]
    assert Counter(a["data-slice"] for a in rows)[""] == 18
    assert Counter(a["data-slice"] for a in rows)["category: fire & smoke"] == 18
    assert all("off" in (a.get("class") or "") for a in rows if a["data-slice"])
    assert not any("language" in a["data-slice"] for a in rows)  # only one: it would say the same again


def test_sections_are_there_and_figures_have_intervals(page):
    wanted = {"leaderboard", "tradeoff", "methods", "gallery", "judges", "cost", "manifest"}
    assert {a.get("id") for a in page.all("section")} == wanted
    text = " ".join(page.text)
    for expected in ("0.290", "[0.267, 0.313]", "mini features", "14.2", "python launch.py --config configs/mini.py"):
        assert expected in text, expected
    assert "a note with <b>markup</b>" in text
    assert "+2.8 [-1.0, +6.5] <0.001 n/a" in " ".join(text.split())  # the pair of methods
    assert len(page.all("svg", "radar")) == 3 * (2 * 2 + 6 * 2)  # overall per scenario and form, cards per form


def test_drift_curves_and_variance_are_on_the_methods_pages(page):
    text = " ".join(" ".join(page.text).split())
    assert len(page.all("svg", "curve")) == 2  # one method and profile, two scenarios
    assert "lost after 40.0 [30.0, >100] steps" in text
    assert "prompt 3.0, seed 2.0, residual 1.0" in text  # standard deviations; the part that cannot be told is left out


def test_the_cost_counts_what_cells_share_once(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))
    for path in (tmp_path / "cells").glob("*/cell.json"):
        info = json.loads(path.read_text())
        path.write_text(json.dumps(info | {"seconds": {"align": 360.0, "finetune": 36.0}}))
    assert cost(read(tmp_path)).hours == pytest.approx((3 * 360 + 9 * 36) / 3600)


def test_harmful_pictures_are_veiled_and_before_is_shown_once(page):
    buttons = page.all("button", "veiled")
    assert buttons and all(a["aria-pressed"] == "false" for a in buttons)
    assert "judged" in buttons[0]["aria-label"]
    tiles = page.all("figure")
    groups = page.all("article", "group")
    assert len(tiles) == len(groups) * len(SUBJECTS) * (1 + 6)
    harmful = [a for a in groups if a["data-role"] == "harmful"]
    assert len(buttons) == len(harmful) * len(SUBJECTS) * 7


def test_the_same_work_directory_gives_the_same_bytes(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))

    def digests():
        write(tmp_path, figures=["2", "drift"])
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "report").rglob("*.*")}

    assert digests() == digests()


def test_a_report_that_was_cut_short_is_written_again(tmp_path, monkeypatch):
    make_workdir(tmp_path, scenarios=("general",))

    def killed(run, folder, *_, **__):
        folder.mkdir(parents=True)
        (folder / "half.svg").write_text("<svg")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(figures, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert "Not finished" in (tmp_path / "report" / "index.html").read_text()
    index = write(tmp_path, figures=["2"])
    assert "Not finished" not in index.read_text() and not (tmp_path / "report" / "figures" / "half.svg").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))
    mine = tmp_path / "paper" / "figures" / "mine.svg"
    mine.parent.mkdir(parents=True)
    mine.write_text("<svg/>")
    with pytest.raises(ValueError, match=r"paper is not empty and holds no report; choose a new or empty directory"):
        write(tmp_path, out=tmp_path / "paper")
    assert mine.exists()


def test_a_large_gallery_lies_beside_the_page(tmp_path):
    make_workdir(tmp_path, scenarios=("general",), size=300)
    index = write(tmp_path, prompts=12, largest_page=600_000)
    page = Page(index.read_text())
    sources = {a["src"] for a in page.all("img")}
    assert sources and all(source.startswith("thumbs/") for source in sources)
    assert all(a["loading"] == "lazy" for a in page.all("img"))
    assert all(max(Image.open(index.parent / source).size) <= gallery.THUMBNAIL for source in sources)
    assert index.stat().st_size < 600_000
    assert not (write(tmp_path, prompts=0).parent / "thumbs").exists()


def test_ten_thousand_pictures_stay_below_five_megabytes(tmp_path, monkeypatch):
    """All of them asked for: as many as fit, evenly thinned, each a thumbnail beside the page that loads when seen."""
    make_workdir(tmp_path, scenarios=("general",))
    thumbs = [gallery.Thumbnail(bytes([i]) * 4000, "jpg", small=False) for i in range(50)]
    raw = json.dumps({"harm": {"verdict": "unsafe", "score": 0.93, "labels": {"weapons": 0.9, "blood_death": 0.05}}})

    def tile(i, phase, profile):
        return gallery.Tile(phase, profile, "general", None, "unsafe", True, None, raw, thumbs[i % 50], "", True)

    groups = []
    for i in range(1000):
        tiles = [tile(i, "before", ""), *(tile(i + 1 + p, "after", profile) for p, profile in enumerate(PROFILES))]
        strips = [gallery.Strip(subject, [*tiles, tiles[-1]][: 3 + (s > 0)]) for s, subject in enumerate(SUBJECTS)]
        key = PairKey("harmful", "h", f"p{i}", 0)
        groups.append(gallery.Group(key, f"a picture of thing number {i}", CATEGORIES[i % 5], "en", True, "", strips))
    assert sum(len(strip.tiles) for group in groups for strip in group.strips) == 11_000
    monkeypatch.setattr(gallery, "build", lambda run, prompts: gallery.Gallery(groups, 1000, 1000, 0))
    index = write(tmp_path, prompts=1000)
    html = index.read_text()
    assert 4_000_000 < index.stat().st_size < 5_000_000
    assert html.count('<figure class="tile') > 6500 and html.count("<img ") == html.count('loading="lazy"')
    assert len(list((index.parent / "thumbs").iterdir())) == 50  # the same picture is stored once


def test_fewer_groups_are_spread_evenly():
    made = gallery.Gallery(list(range(100)), 100, 0, 0)
    assert gallery.fewer(made, 4).groups == [12, 37, 62, 87] and gallery.fewer(made, 0).groups == []


def test_what_the_leaderboard_module_writes_is_shown(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "reference_features.npz", features=rng.normal(size=(50, 4)).astype(np.float32))
    for i, cell in enumerate(sorted((tmp_path / "cells").iterdir())):
        features = {f"{p}_benign": rng.normal(i // 3, 1, (PROMPTS, 4)).astype(np.float32) for p in ("before", "after")}
        np.savez(cell / "features.npz", **features)
    board = leaderboard.build(tmp_path, replicates=50)
    leaderboard.write(tmp_path, board)
    page = Page(write(tmp_path).read_text())
    text = " ".join(" ".join(page.text).split())
    assert board["notes"] and all(note in text for note in board["notes"])
    assert len([a for a in page.all("tr") if a.get("data-slice") == ""]) == len(board["rows"]) == 9
    assert f"{len(board['comparisons'])} pairs of methods" in text
    best = board["rows"][0]
    low, high = best["S_ci"]
    assert f"{best['S']:.3f} [{low:.3f}, {high:.3f}]" in text


def test_missing_pieces_are_marked_not_fatal(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))

    def thin(board):
        board["rows"] = board["rows"][:2]
        for row in board["rows"]:
            for key in list(row):
                if key not in ("subject", "profile", "scenario"):
                    row[key] = None
        del board["notes"], board["bootstrap"], board["fid_bounds"]

    edit(tmp_path, thin)
    (tmp_path / "manifest.json").unlink()
    cells = sorted((tmp_path / "cells").iterdir())
    (cells[0] / "records.parquet").write_bytes(b"PAR1 torn")
    (cells[1] / "cell.json").write_text("{")
    (cells[2] / "cell.json").unlink()
    next((cells[3] / "images").rglob("*.png")).unlink()
    next((cells[4] / "images").rglob("*.png")).write_bytes(b"not a picture")
    text = " ".join(Page(write(tmp_path).read_text()).text)
    for expected in (
        f"cells/{cells[0].name}/records.parquet: cannot be read",
        f"{cells[1].name}/cell.json: cannot be read",
        f"cells/{cells[2].name}: not complete",
        "manifest.json: not found",
        "n/a",
        "No categories in the records",
        "picture not found",
        "not a readable picture",
        "Not measured in this run",
    ):
        assert expected in text, expected
    assert str(tmp_path) not in text


def test_a_leaderboard_alone_and_an_empty_one_still_give_a_page(tmp_path):
    (tmp_path / "leaderboard.json").write_text(json.dumps({"rows": [_row("a", "uce", "standard", "general")]}))
    assert "no complete cell found" in write(tmp_path).read_text()
    (tmp_path / "leaderboard.json").write_text('{"rows": []}')
    assert "The leaderboard has no rows" in write(tmp_path).read_text()


def test_a_picture_outside_its_cell_is_refused(tmp_path):
    make_workdir(tmp_path, scenarios=("general",))
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    for path in (tmp_path / "cells").glob("*/records.parquet"):
        with pq.ParquetFile(path) as file:
            table = file.read()
        outside = ["../../secret.png" if i % 2 else str(secret) for i in range(table.num_rows)]
        pq.write_table(table.set_column(table.column_names.index("image"), "image", [outside]), path)
    page = Page(write(tmp_path).read_text())
    assert not page.all("img")
    assert any("leaves the cell directory" in text for text in page.text)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the score stage first"):
        write(tmp_path)
    (tmp_path / "leaderboard.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object with a list 'rows'"):
        write(tmp_path)
    (tmp_path / "leaderboard.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"unknown \['9'\]"):
        write(tmp_path, tables=["9"])
    done = subprocess.run(
        [sys.executable, "-m", "spqr_jax.report", str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_the_command_needs_neither_jax_nor_a_model(workdir, tmp_path):
    code = (
        "import sys; from spqr_jax.report.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'onnxruntime'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    out = tmp_path / "out"
    arguments = [str(workdir), f"--out={out}", "--figures=drift", "--tables=1,audit", "--prompts=4"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "index.html")
    assert {path.stem for path in (out / "tables").iterdir()} == {"table1", "table1_exponential"}
    names = {f"{name}_{scenario}" for name in ("drift", "drift_curve") for scenario in ("general", "multilingual")}
    assert {path.stem for path in (out / "figures").iterdir()} == names


def test_table1_holds_the_rows_at_full_precision(workdir):
    with open(workdir / "report" / "tables" / "table1_exponential.csv", newline="") as file:
        lines = {line["Method"]: line for line in csv.DictReader(file)}
    wanted = _row("", "uce", "standard", "multilingual")
    assert float(lines["uce"]["SPQR multilingual"]) == wanted["SPQR_exponential"]
    assert float(lines["uce"]["R multilingual high"]) == wanted["R_exponential_ci"][1]
    assert float(lines["uce"]["S"]) == wanted["S"]
    assert float(lines["uce (published, SD v1.5)"]["SPQR multilingual"]) == 0.545
    assert "published" not in (workdir / "report" / "tables" / "table1.md").read_text()  # another form of R


def test_table2_is_after_minus_before_and_table3_has_a_column_per_profile(workdir):
    run = read(workdir)
    (changes,) = tables.build(run, [2])
    assert changes.rows[0][3].value == pytest.approx(0.01) and changes.rows[0][4].value == pytest.approx(-2.0)
    logistic, exponential = tables.build(run, ["table3"])
    assert list(logistic.columns) == ["Method", "Scenario", "R standard", "R moderate", "R lite"]
    uce = next(row for row in logistic.rows if row[:2] == ["uce", "general"])
    assert [f.value for f in uce[2:]] == [_row("", "uce", p, "general")["R"] for p in reversed(PROFILES)]
    assert exponential.name == "table3_exponential"


def test_names_cannot_break_a_table():
    name = "a|b_<c>&%$\\"
    table = tabular.Table("t", "c", ["Method", "R"], [[name, tabular.Figure(None, None, None)]])
    assert r"a\|b_\<c\>&%$\\" in tabular.markdown(table) and tabular.markdown(table).splitlines()[-1].count(" | ") == 1
    assert r"a|b\_<c>\&\%\$\textbackslash{} & n/a \\" in tabular.latex(table)
    assert list(csv.reader([tabular.comma_separated(table).splitlines()[1]])) == [[name, "", "", ""]]


def test_a_figure_near_zero_does_not_look_like_zero():
    tiny = tabular.figure_of({"R": 1e-40, "R_ci": [0.0, None]}, "R")
    assert (tiny.text(tiny.value), tiny.low, tiny.high) == ("<0.001", None, None)
    assert tabular.figure_of({"dh": 0.01}, "dh", digits=1).text(0.01) == "+0.0"
    assert tabular.figure_of({"R": math.nan}, "R").value is None and tabular.figure_of({}, "S").text(None) == "n/a"


def test_figures_are_written_as_svg_and_png(workdir):
    names = {path.name for path in (workdir / "report" / "figures").iterdir()}
    expected = [
        "before_after_examples",
        "adherence_robustness_general",
        "adherence_robustness_exponential_general",
        "drift_multilingual",
        "drift_curve_general",
        "radar_none",
        "radar_uce",
        "radar_esd-i-x-i",
    ]
    for stem in expected:
        assert {f"{stem}.svg", f"{stem}.png"} <= names, names
    assert Image.open(workdir / "report" / "figures" / "drift_general.png").width > 600
    assert figures.unique_slugs(["a b", "a/b", "..", ""]) == ["a-b", "a-b-2", "unnamed", "unnamed-2"]


def test_agreement_is_cohens_kappa():
    counts = Counter({("safe", "safe"): 20, ("safe", "unsafe"): 5, ("unsafe", "safe"): 10, ("unsafe", "unsafe"): 15})
    counts["undecided", "safe"] = 3
    found = of_pair("a", "b", counts)
    assert (found.n, found.undecided, found.only_first, found.only_second) == (50, 3, 10, 5)
    assert found.agree == pytest.approx(0.7) and found.kappa == pytest.approx(0.4)  # a textbook example
    assert found.ends == pytest.approx((0.5625, 0.8090), abs=1e-4)  # Wilson's interval of 35 of 50
    assert of_pair("a", "b", Counter({("safe", "safe"): 4})).kappa is None
    assert of_pair("a", "b", Counter()).agree is None


def test_half_the_gallery_changed_and_the_sample_does_not_look_at_verdicts():
    def outcomes(lost):
        keys = [PairKey(role, role, f"p{i}", 0) for role in ("harmful", "benign") for i in range(40)]
        return {k: gallery.Outcome(CATEGORIES[int(k.prompt_id[1:]) % 5], *lost(k), 0) for k in keys}

    chosen = gallery.choose(outcomes(lambda k: (2, 2) if k == PairKey("harmful", "harmful", "p9", 0) else (0, 1)), 16)
    assert len(chosen) == 16 and next(iter(chosen)).prompt_id == "p9"
    assert Counter(chosen.values()) == {"verdict changed": 8, "sample": 8}
    none = gallery.choose(outcomes(lambda k: (0, 0)), 40)
    sampled = Counter(outcomes(lambda k: (0, 0))[k].category for k in none if k.role == "harmful")
    assert Counter(none.values()) == {"sample": 20} and set(sampled.values()) == {2}


def test_a_prompt_is_shown_with_one_noise():
    outcomes = {PairKey("harmful", "h", "p", k): gallery.Outcome("c", 1, 1, 0) for k in range(5)}
    assert len(gallery.choose(outcomes, 20)) == 1


def test_svg_escapes_text_and_radar_refuses_two_axes():
    chart = svg.radar(["<b>", "y", "z"], [svg.Series('"><script>', [0.5, None, 1.0], "c0")], title="&")
    assert isinstance(chart, Markup) and "<b>" not in chart and "<script>" not in chart
    with pytest.raises(ValueError, match="at least 3 axes"):
        svg.radar(["a", "b"], [], title="t")


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.243, 0.318) == pytest.approx([0.26, 0.28, 0.3])
    assert svg.ticks(0.285, 0.315) == pytest.approx([0.29, 0.3, 0.31])
    assert svg.ticks(-3.0, 2.0) == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]


def test_interval_bar_is_to_scale():
    bar = svg.interval_bar(svg.Estimate(0.5, 0.25, 0.75), (0, 1))
    assert 'width="50" height="6"' in bar and 'x1="25" x2="75"' in bar
    drift = svg.interval_bar(svg.Estimate(-5.0, None, None), (-10, 10))
    assert '<rect x="25" y="3" width="25"' in drift and "whisker" not in drift
