"""The board in headless Chromium: silent console, sorting, filters, keyboard, phone, dark mode, size."""

import shutil
import time

import pytest

from spqr_jax.board import site
from tests.board import bundles

MANY = 500


@pytest.fixture
def page(browser, made, board):
    browser.get((made / "site" / "index.html").as_uri())
    return browser


def names(page, table: str = "section.table") -> list[str]:
    """The subjects of the first table that a reader sees, in order."""
    code = """return [...document.querySelector(arguments[0]).querySelectorAll("tbody th a")]
      .filter(a => a.offsetParent).map(a => a.textContent)"""
    return page.execute_script(code, table)


def main_table(page) -> str:
    """A selector of the table with most rows."""
    code = """return "#" + [...document.querySelectorAll("section.table")].sort(
      (a, b) => b.querySelectorAll("tbody tr[id]").length - a.querySelectorAll("tbody tr[id]").length)[0].id"""
    return page.execute_script(code)


def visible(page) -> int:
    return page.execute_script(
        "return [...document.querySelectorAll('.board tbody tr')].filter(tr => tr.offsetParent).length"
    )


def enter(page, name: str, value: str) -> None:
    """Set a field as a reader does: the page must hear of it."""
    code = "const f = document.querySelector(`#filters [name=${arguments[0]}]`); f.value = arguments[1];"
    page.execute_script(code + "f.dispatchEvent(new Event('input', {bubbles: true}))", name, value)


def test_the_console_is_silent_on_every_page(browser, made, board):
    for path in sorted((made / "site").rglob("*.html")):
        browser.get(path.as_uri())
        assert browser.get_log("browser") == [], path.name
        assert browser.execute_script("return document.scripts.length") == 1
        requests = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in requests if not name.startswith("data:")] == []


def test_the_policy_stops_an_injected_script(page):
    code = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
    assert page.execute_script(code + "return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_columns_sort_both_ways_with_the_keyboard(page):
    table = main_table(page)
    ranked = names(page, table)
    th = page.find_element("css selector", f"{table} th[title^='safety']")
    button = th.find_element("css selector", "button")
    code = """const th = arguments[0];
      return [...th.closest("table").tBodies[0].rows].map(r => Number(r.cells[th.cellIndex].dataset.value))"""
    button.send_keys("\ue007")  # Enter
    values = page.execute_script(code, th)
    assert values == sorted(values, reverse=True) and th.get_attribute("aria-sort") == "descending"
    button.send_keys(" ")
    values = page.execute_script(code, th)
    assert values == sorted(values) and len(set(values)) > 2 and th.get_attribute("aria-sort") == "ascending"
    page.find_element("css selector", f"{table} th[title^='by SPQR'] button").send_keys("\ue007")
    assert names(page, table) == ranked
    assert len(page.find_elements("css selector", f"{table} [aria-sort]")) == 1


def test_filters_and_search(page, board):
    total = sum(len(table.lines) for table in board.tables)
    count = page.find_element("id", "count")
    assert visible(page) == total and count.text == f"{total} rows"
    enter(page, "search", "rece")
    assert visible(page) == 2 and count.text == f"2 of {total} rows"
    enter(page, "search", board.submissions[0].id[:12])
    assert visible(page) == sum(line.submission is board.submissions[0] for t in board.tables for line in t.lines)
    enter(page, "search", "no such method")
    assert visible(page) == 0 and page.find_element("id", "nothing").is_displayed()
    enter(page, "search", "")
    enter(page, "profile", "standard")
    assert visible(page) == 2
    enter(page, "profile", "")
    page.find_element("css selector", "[name=controls]").click()
    assert visible(page) == total - 1
    enter(page, "division", "closed")
    assert visible(page) == 0


def test_a_link_to_a_row_leads_there_whatever_the_filters(page, board):
    anchor = board.tables[0].lines[0].entry.anchor
    enter(page, "search", "no such method")
    page.execute_script("location.hash = arguments[0]", anchor)
    time.sleep(0.2)
    assert page.find_element("id", anchor).is_displayed()


def test_rows_lead_to_submissions_and_back(page):
    link = page.find_element("css selector", "section.table tbody th a")
    name, where = link.text, page.execute_script("return arguments[0].closest('tr').id", link)
    page.execute_script("arguments[0].click()", link)
    assert "/submissions/" in page.current_url and page.current_url.endswith(f"#{where}")
    back = page.find_element("css selector", f"#{where} th a")
    assert back.text == name
    page.execute_script("arguments[0].click()", back)
    assert page.current_url.endswith(f"index.html#{where}") and page.find_element("id", where).is_displayed()


def test_without_scripts_the_tables_are_whole(page, made, board):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get((made / "site" / "index.html").as_uri())
        rows = page.find_elements("css selector", ".board tbody tr")
        assert len(rows) == sum(len(table.lines) for table in board.tables) and all(row.is_displayed() for row in rows)
        assert not page.find_element("id", "filters").is_displayed()
        assert page.find_elements("css selector", ".board thead button") == []
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_phone_does_not_scroll_sideways_and_the_system_chooses_the_colours(page, made, board):
    code = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(code)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        assert page.execute_script(code) != light
        for path in sorted((made / "site").rglob("*.html")):
            page.get(path.as_uri())
            assert page.execute_script("return document.documentElement.scrollWidth") <= 360, path.name
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def seconds(page) -> float:
    """Processor time of the page's main thread so far, which does not depend on what else a machine does."""
    metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(m["value"] for m in metrics if m["name"] == "TaskDuration")


@pytest.mark.slow
def test_hundreds_of_submissions(browser, tmp_path):
    """500 bundles: verified once, built again from the cache in seconds, loaded and sorted in less than two."""
    for i in range(MANY):
        bundles.bundle(tmp_path, f"s{i:03}", ("No alignment", f"Method {i}"), draw=i)
        shutil.rmtree(tmp_path / "runs")
    site.write([tmp_path / "bundles"], tmp_path / "site", cache=tmp_path / "cache")
    start = time.process_time()
    board = site.write([tmp_path / "bundles"], tmp_path / "site", cache=tmp_path / "cache")
    assert time.process_time() - start < 60
    assert len(board.submissions) == MANY and [len(t.lines) for t in board.tables] == [2 * MANY]
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get((tmp_path / "site" / "index.html").as_uri())
    loaded = seconds(browser)
    assert visible(browser) == 2 * MANY and loaded < 2
    before = seconds(browser)
    sort = """document.querySelectorAll(".board thead button")[3].click(); document.body.offsetHeight"""
    browser.execute_script(sort)
    assert seconds(browser) - before < 2
    enter(browser, "search", "method 77")
    assert visible(browser) == 1 and browser.get_log("browser") == []
    browser.execute_cdp_cmd("Performance.disable", {})
