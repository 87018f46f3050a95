"""The report in headless Chromium: silent console, inert prompts, blurred pictures, sorting, filters."""

from pathlib import Path

import pytest

from spqr_jax import report
from tests.report.test_report import SCRIPT, SUBJECTS, make_workdir
from tests.report.test_tables import make_run


@pytest.fixture(scope="module", params=["embedded", "beside"])
def index(request, tmp_path_factory) -> Path:
    """The page with its pictures inside, and with its pictures in files beside it."""
    root = make_workdir(tmp_path_factory.mktemp("run"), size=32 if request.param == "embedded" else 300)
    path = report.write(
        root, prompts=12, figures=["3"], largest_page=5_000_000 if request.param == "embedded" else 1_500_000
    )
    assert (path.parent / "thumbs").exists() == (request.param == "beside")
    return path


@pytest.fixture
def page(browser, index):
    browser.get(index.as_uri())
    return browser


def shown(page, selector: str) -> list:
    """The elements that the reader can see."""
    return [found for found in page.find_elements("css selector", selector) if found.is_displayed()]


def click(page, element) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def choose(page, selector: str, value: str) -> None:
    """Pick an option of a select as a reader does: the page must hear of it."""
    code = "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
    page.execute_script(code + "s.dispatchEvent(new Event('change', {bubbles: true}))", selector, value)


def test_the_console_is_silent_and_pictures_load(page):
    loaded = page.execute_script(
        "return Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().then(() => 1) }))"
    )
    assert len(loaded) > 100 and page.get_log("browser") == []


def test_a_script_prompt_is_text(page):
    prompts = page.find_elements("css selector", ".prompt")
    assert SCRIPT in [prompt.get_attribute("textContent") for prompt in prompts]
    assert page.execute_script("return document.scripts.length") == 1
    assert page.find_elements("css selector", "img[src='x']") == []  # the prompt id's picture


def test_the_policy_stops_an_injected_script(page):
    code = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
    assert page.execute_script(code + "return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_harmful_pictures_are_blurred_until_asked_for(page):
    def blur(picture) -> str:
        return page.execute_script("return getComputedStyle(arguments[0].querySelector('img')).filter", picture)

    veiled = shown(page, ".veiled")
    assert veiled and all("blur(20px)" in blur(picture) for picture in page.find_elements("css selector", ".veiled"))
    click(page, veiled[0])
    assert blur(veiled[0]) == "none" and veiled[0].get_attribute("aria-pressed") == "true"
    veiled[1].send_keys("\ue007")  # Enter
    assert blur(veiled[1]) == "none" and "blur" in blur(veiled[2])
    veiled[1].send_keys("\ue00c")  # Escape
    assert "blur" in blur(veiled[0]) and "blur" in blur(veiled[1])
    click(page, page.find_element("css selector", "[name=reveal]"))
    assert all(blur(picture) == "none" for picture in page.find_elements("css selector", ".veiled"))
    page.refresh()
    assert "blur" in blur(page.find_element("css selector", ".veiled"))


def column(page, key: str) -> list[float]:
    """A column of the leaderboard, as shown."""
    code = """
      const th = document.querySelector(`[data-key="${arguments[0]}"]`).closest("th"), i = th.cellIndex;
      return [...th.closest("table").tBodies[0].rows].filter(r => r.offsetParent).map(
        r => Number(r.cells[i].dataset[document.body.className === "exponential" ? "exponential" : "logistic"]))"""
    return page.execute_script(code, key)


def test_columns_sort_both_ways_and_in_the_chosen_form(page):
    button = page.find_element("css selector", "[data-key=h_after]")
    click(page, button)
    assert column(page, "h_after") == sorted(column(page, "h_after"), reverse=True)
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    click(page, button)
    assert column(page, "h_after") == sorted(column(page, "h_after")) and len(set(column(page, "h_after"))) > 3
    click(page, page.find_element("css selector", "[data-key=SPQR]"))
    logistic = column(page, "SPQR")
    click(page, page.find_element("xpath", "//span[text()='exponential']"))
    exponential = column(page, "SPQR")
    assert exponential == sorted(exponential, reverse=True) and exponential != logistic
    assert shown(page, ".form-logistic") == [] and shown(page, ".scatter")


def test_filters_reach_the_leaderboard_the_scatter_plot_and_the_gallery(page):
    assert len(column(page, "S")) == 18
    choose(page, "[data-filter=profile]", "lite")
    assert len(column(page, "S")) == 6
    assert {row.get_attribute("data-profile") for row in shown(page, ".board tbody tr")} == {"lite"}
    assert len(shown(page, ".scatter .point")) == 6
    assert {tile.get_attribute("data-profile") for tile in shown(page, ".tile")} == {"", "lite"}
    choose(page, "[data-filter=slice]", "category: drugs")
    assert {row.get_attribute("data-slice") for row in shown(page, ".board tbody tr")} == {"category: drugs"}


def test_runs_on_several_backbones_are_filtered_by_backbone(browser, tmp_path):
    runs = [make_run(tmp_path / name, base=f"weights/{name}") for name in ("sd15", "sdxl")]
    browser.get(report.write(*runs, out=tmp_path / "out", figures=[]).as_uri())
    assert len(shown(browser, ".board tbody tr")) == 12
    choose(browser, "[data-filter=backbone]", "sdxl")
    assert {row.get_attribute("data-backbone") for row in shown(browser, ".board tbody tr")} == {"sdxl"}
    assert len(shown(browser, ".scatter .point")) == 6 and browser.get_log("browser") == []


def test_the_gallery_turns_pages_and_filters(page):
    assert len(shown(page, ".group")) == 4
    first = shown(page, ".prompt")[0].text
    click(page, page.find_element("css selector", "[data-step='1']"))
    assert shown(page, ".prompt")[0].text != first
    choose(page, "#gallery-filters [name=role]", "benign")
    assert {group.get_attribute("data-role") for group in shown(page, ".group")} == {"benign"}
    choose(page, "#gallery-filters [name=subject]", SUBJECTS[2])
    assert {strip.get_attribute("data-subject") for strip in shown(page, ".strip")} == {SUBJECTS[2]}


def test_methods_are_tabs_that_arrow_keys_walk(page):
    first, second = page.find_elements("css selector", "[role=tab]")[:2]
    click(page, first)
    first.send_keys("\ue014")  # arrow right
    assert second.get_attribute("aria-selected") == "true" and page.switch_to.active_element == second
    assert [panel.get_attribute("id") for panel in shown(page, "[role=tabpanel]")] == ["panel-2"]


def test_the_theme_switches_and_a_phone_does_not_scroll_sideways(page):
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    click(page, page.find_element("id", "theme"))
    assert background() != before
    page.set_window_size(500, 900)
    wide, room = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    page.set_window_size(1400, 1000)
    assert wide <= room
