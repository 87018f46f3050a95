"""The pages as a parser reads them: whole without scripts, named for those who cannot see, and safe from bundles."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from spqr_jax.board import pages, site
from spqr_jax.report.__main__ import main
from tests.board.conftest import NASTY, SCRIPT

EMPTY = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """The elements of a page: (name, attributes, texts in it) in order, and the policy."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict, list]] = []
        self.open: list = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, "not closed"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1][0]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [
            (attributes, " ".join("".join(texts).split())) for name, attributes, texts in self.elements if name == tag
        ]


@pytest.fixture(scope="module")
def parsed(made, board) -> dict[str, Page]:
    found = {path.relative_to(made / "site").as_posix(): Page(path) for path in sorted((made / "site").rglob("*.html"))}
    assert len(found) == 1 + len(board.submissions) == 5
    return found


def test_no_script_of_a_bundle_and_no_request(parsed):
    for name, page in parsed.items():
        assert len(page.all("script")) == 1 and not page.all("img") and not page.all("iframe"), name
        script, style = (page.source.split(f"<{tag}>")[1].split(f"</{tag}>")[0] for tag in ("script", "style"))
        policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        for kind, text in (("script", script), ("style", style)):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
        assert not re.search(r"url\(|@import|fetch\(|XMLHttp|https?://", style + script)
        for tag, attributes, _ in page.elements:
            assert not [a for a in attributes if a.startswith("on") or a in ("style", "srcdoc", "action")], (name, tag)
            for link in ("src", "href"):
                assert not attributes.get(link, "").startswith(("http", "//", "javascript")), (name, attributes)


def test_texts_of_bundles_are_texts(made, board, parsed):
    nasty = next(s for s in board.submissions if s.name == "nasty")
    page = parsed[pages.page_of(nasty)]
    texts = " ".join("".join(texts) for _, _, texts in page.elements)
    assert SCRIPT in texts and NASTY in texts
    assert "\u202e" not in page.source and "\N{REPLACEMENT CHARACTER}gnp.exe" in texts
    index = parsed["index.html"]
    assert NASTY in [text for _, text in index.all("a")]
    refused = next(a for a, _ in index.all("section") if a.get("id") == "refused")
    assert refused and "<img src=x onerror=alert(3)>" in " ".join(text for _, text in index.all("h3"))


def test_links_lead_somewhere(made, parsed):
    anchors = {name: [a["id"] for _, a, _ in page.elements if "id" in a] for name, page in parsed.items()}
    for name, page in parsed.items():
        assert len(anchors[name]) == len(set(anchors[name])), "an id twice"
        for attributes, text in page.all("a"):
            link = urlsplit(attributes["href"])
            target = ((made / "site" / name).parent / link.path).resolve() if link.path else made / "site" / name
            file = target.relative_to((made / "site").resolve() if link.path else made / "site").as_posix()
            assert file in parsed, attributes
            assert not link.fragment or unquote(link.fragment) in anchors[file], attributes
            assert text or attributes.get("aria-label"), attributes


def test_links_survive_a_new_submission(made, board, tmp_path):
    """Pages and anchors come from ids and conditions alone."""
    more = site.write([made / "bundles" / "a"], tmp_path / "site", cache=made / "cache")
    own = more.submissions[0]
    before, after = (
        {t.anchor for t in b.tables for line in t.lines if line.submission.id == own.id} for b in (more, board)
    )
    assert before and before == after
    rows = {line.entry.anchor for t in more.tables for line in t.lines}
    assert rows <= {line.entry.anchor for t in board.tables for line in t.lines}
    assert (tmp_path / "site" / pages.page_of(own)).exists() and (made / "site" / pages.page_of(own)).exists()


def test_tables_are_named_and_whole_without_scripts(board, parsed):
    for name, page in parsed.items():
        assert page.source.startswith("<!doctype html>") and page.elements[0][1]["lang"] == "en"
        tables = page.all("table")
        assert len(page.all("caption")) == len(tables) > 0 and all(text for _, text in page.all("caption")), name
        assert all(a.get("scope") in ("col", "row") for a, _ in page.all("th")), name
        for attributes, text in page.all("div"):
            if "scroll" in attributes.get("class", ""):
                named = attributes.get("aria-label") or attributes.get("aria-labelledby")
                assert attributes.get("tabindex") == "0" and attributes.get("role") == "region" and named, text[:50]
        assert all(a.get("aria-hidden") == "true" for a, _ in page.all("svg"))
    index = parsed["index.html"]
    rows = [a for a, _ in index.all("tr") if a.get("id", "").startswith("r-")]
    assert len(rows) == sum(len(table.lines) for table in board.tables)
    sorted_by = [a["aria-sort"] for a, _ in index.all("th") if "aria-sort" in a]
    assert sorted_by == ["ascending"] * len(board.tables)
    fields = [a for tag in ("input", "select") for a, _ in index.all(tag)]
    labels = " ".join(text for _, text in index.all("label"))
    assert len(fields) == len(index.all("label")) and "Search" in labels and "Division" in labels
    assert next(a for a, _ in index.all("form")).get("hidden", "") is None  # scripts show what only they can do


def test_figures_stand_as_in_the_table(board, parsed):
    texts = {a["id"]: text for a, text in parsed["index.html"].all("tr") if a.get("id", "").startswith("r-")}
    for table in board.tables:
        for line in table.lines:
            row, text = line.row, texts[line.entry.anchor]
            assert f"{row['S']:.3f}[{row['S_ci'][0]:.3f}, {row['S_ci'][1]:.3f}]" in text
            assert f"{row['dh']:+.1f}" in text and line.submission.id[:12] in text
            assert row["rank"] is None or f"{row['rank']}" in text


def test_published_figures_are_marked(parsed):
    lines = [text for _, text in parsed["index.html"].all("tr") if "not verifiable" in text]
    assert len(lines) == 11 + 8 + 11 + 6 and any(
        line.startswith("rece SDv1.5 0.938 0.292") or "rece" in line for line in lines
    )
    assert not [a for a, text in parsed["index.html"].all("tr") if "not verifiable" in text and "id" in a]


def test_a_page_of_a_submission_says_what_it_is(board, parsed):
    for submission in board.submissions:
        text = " ".join(text for _, text in parsed[pages.page_of(submission)].all("main"))
        assert f"python -m spqr_jax.report verify DIR --id {submission.id}" in text
        assert all(reason in text for reason in submission.verification.reasons)
        assert (
            "verified" in text
            and "sha256" in text
            and submission.manifest["versions"].get("jax", "not checked") in text.lower()
        )


def test_the_same_bundles_give_the_same_bytes_and_old_pages_go(made, tmp_path):
    bundles = [made / "bundles" / name for name in ("a", "b")]
    site.write(bundles, tmp_path / "site", cache=made / "cache")
    first = {p.name: p.read_bytes() for p in (tmp_path / "site").rglob("*.html")}
    site.write(bundles[::-1], tmp_path / "site", cache=made / "cache")
    assert {p.name: p.read_bytes() for p in (tmp_path / "site").rglob("*.html")} == first and len(first) == 3
    site.write(bundles[:1], tmp_path / "site", cache=made / "cache")
    assert len(list((tmp_path / "site").rglob("*.html"))) == 2


def test_the_command_tells_what_is_wrong(made, tmp_path, capsys):
    arguments = ["board", str(made / "bundles"), "--out", str(tmp_path / "site"), "--cache", str(made / "cache")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "4 submissions" in printed and "1 not verified" in printed and "leaderboard.json" in printed
    assert main([*arguments, "--strict"]) == 1
    assert main(["board", str(tmp_path / "nothing"), "--out", str(tmp_path / "s")]) == 1
