"""A report in headless Chromium: no errors, requests or overflow; theme, values, print."""

import json
import shutil

import pytest

from ebmkit.report import read_run, render_report

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def page_of(browser, tmp_path):
    """Function that opens the report of runs; it fails if there was an error or a request."""
    messages, requests, contexts = [], [], []

    def open_page(runs, width=1400, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(render_report([read_run(run) for run in runs]))
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
    assert [r for r in requests if not r.startswith(("data:", "file:"))] == []
    assert len([r for r in requests if r.startswith("file:")]) == len(contexts)


@pytest.fixture
def long_run(make_run):
    """A run whose name, class names and settings do not fit a narrow page."""
    path = make_run("a-run-with-a-name-that-is-as-long-as-they-come-" + 3 * "x1234567890")
    file = path / "evaluation" / "classify.json"
    document = json.loads(file.read_text())
    document["warnings"] = ["W" * 120]
    file.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("several", [False, True])
def test_nothing_overflows(page_of, make_run, long_run, width, several):
    runs = [long_run, make_run("second")] if several else [long_run]
    page = page_of(runs, width)
    assert page.evaluate(OVERFLOW) == 0
    for summary in page.locator("details > summary").all():
        if not summary.evaluate("own => own.parentElement.open"):
            summary.click()
    assert page.evaluate(OVERFLOW) == 0


def test_colours_follow_the_system_and_the_button(page_of, make_run):
    run = make_run()
    light, dark = (page_of([run], scheme=scheme) for scheme in ("light", "dark"))
    before = light.evaluate(BACKGROUND), dark.evaluate(BACKGROUND)
    assert before[0] != before[1]
    for page in (light, dark):
        page.click("#theme")
    assert (light.evaluate(BACKGROUND), dark.evaluate(BACKGROUND)) == (before[1], before[0])
    light.click("#theme")
    assert light.evaluate(BACKGROUND) == before[0]


def test_the_pointer_shows_the_values_at_the_nearest_step(page_of, make_run):
    page = page_of([make_run()])
    plot = page.locator(".plot", has=page.locator("svg[aria-label^='loss ce']")).first
    plot.scroll_into_view_if_needed()
    area, panel = plot.bounding_box(), json.loads(plot.get_attribute("data-panel"))
    left, _, width, _ = panel["box"]
    first, last = panel["range"][:2]
    at = left + width * (30 - first) / (last - first)
    page.mouse.move(area["x"] + at * area["width"] + 1, area["y"] + area["height"] / 2)
    assert page.locator("#tip").inner_text().split("\n")[0] == "step 30"
    assert "held-out0.1" in page.locator("#tip").inner_text().replace("\n", "").replace(" ", "")


def test_a_printed_page_is_light_and_has_no_buttons(page_of, make_run):
    page = page_of([make_run()], scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate(BACKGROUND) == "rgb(255, 255, 255)"
    assert not page.locator("#theme").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.pdf().startswith(b"%PDF")
