"""The page in a real browser: no errors, no network, accessible, readable on a phone and on paper, with two themes."""

import functools
import shutil
import subprocess
import unicodedata

import pytest

from adamerge.results.report.facts import read_run
from adamerge.results.report.write import write_report
from tests.support.report_runs import write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # playwright's own
]
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
SECONDS = 300  # a limit against hanging on busy machines, not a measure


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=1000 * SECONDS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Writes a page of runs, by its name, when a test asks for it."""
    folder = tmp_path_factory.mktemp("reports")
    names = ("cars", "a_task_with_quite_a_long_name_of_its_own", "<b onmouseover=alert(1)>svhn</b>")
    rows = {"name": "rows", "rows": 20, "experts": names}
    frank_wolfe = {"name": "<img src=x>", "frank_wolfe": True, "experts": names, "shift": 0.1}
    few = [{"name": name, "experts": names[1:]} for name in ("first", "a_run_with_a_longer_name")]
    one = [{"name": "one", "experts": names, "steps": 1}]
    runs = {"rows": [rows], "frank_wolfe": [frank_wolfe], "both": [rows, frank_wolfe], "few": few, "one": one}

    @functools.cache
    def written(name):
        folders = [write_run(folder / name / str(number), **options) for number, options in enumerate(runs[name])]
        write_report([read_run(run) for run in folders], folder / f"{name}.html")
        return folder / f"{name}.html"

    return written


@pytest.fixture
def visit(browser):
    """Open a page, and fail where it logs anything, or asks the network for anything."""
    contexts, noise = [], []

    def opened(path, viewport=DESKTOP, scheme="light", **options):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        context.set_default_timeout(1000 * SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append("a dialog opened"), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or noise.append(request.url)
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


@pytest.fixture(scope="module")
def wide_page(tmp_path_factory):
    """The page of a run with twenty tasks."""
    folder = tmp_path_factory.mktemp("wide")
    run = write_run(folder / "wide", experts=[f"task_{number}" for number in range(20)], rows=4)
    write_report([read_run(run)], folder / "wide.html")
    return folder / "wide.html"


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(
    ("viewport", "scheme", "name"),
    [
        pytest.param(*window, name, marks=[] if (*window, name) == (DESKTOP, "light", "both") else pytest.mark.slow)
        for window in ((DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"))
        for name in ("rows", "frank_wolfe", "both")
    ],
)
def test_page_is_drawn_accessible_and_no_wider_than_the_window(visit, pages, name, viewport, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = visit(pages(name), viewport, scheme)
    assert background(page) == {"light": "rgb(245, 247, 250)", "dark": "rgb(16, 21, 27)"}[scheme]
    plots = page.locator(".plot")
    assert plots.count() > 2
    assert page.locator(".plot svg").count() == plots.count()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    results = axe.Axe().run(page)
    found = [v for v in results.response["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in found] == []
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_captions_wrap(visit, pages, width):
    page = visit(pages("few"), {"width": width, "height": 800})
    for span in page.locator("#result table:not(figure table) caption span").all():
        assert span.bounding_box()["width"] < width


@pytest.mark.slow
def test_printed_page_has_its_figures_and_whole_tables(tmp_path, wide_page):
    """As the browser prints at once, and without anyone who scrolls."""
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    pdf = tmp_path / "page.pdf"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
    subprocess.run([BROWSER, *options, wide_page.as_uri()], check=True, timeout=SECONDS, capture_output=True)
    sheets = pypdf.PdfReader(pdf).pages
    ends = []

    def place(text, matrix, text_matrix, font, size):
        if text.strip():
            ends.append((matrix[4] + matrix[0] * text_matrix[4], text))

    text = " ".join(sheet.extract_text(visitor_text=place) for sheet in sheets)
    text = unicodedata.normalize("NFKC", text)  # ligatures
    for said in ("% of coefficients", "accuracy, %", "relative norm", "attention"):  # words inside of figures
        assert said in text, said
    assert "task_19" in text.replace("\n", "").replace(" ", "")
    assert max(ends)[0] < float(sheets[0].mediabox.width) - 10, max(ends)


@pytest.mark.slow
def test_theme_button_switches_colours_of_page_and_figures(visit, pages):
    page = visit(pages("frank_wolfe"))
    ink = "getComputedStyle(document.querySelector('#figure-losses text')).fill"
    light, text = background(page), page.evaluate(ink)
    button = page.get_by_role("button", name="Switch to the dark theme")
    button.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Switch to the light theme").wait_for()
    assert background(page) != light
    assert page.evaluate(ink) != text
    page.get_by_role("button", name="Switch to the light theme").click()
    assert background(page) == light


def test_page_without_javascript_has_all_figures_and_tables(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages("rows").as_uri())
    assert page.locator("table").count() > 10
    assert page.locator(".plot svg").count() == page.locator(".plot").count() > 5
    assert "Mean accuracy" in page.locator("main").text_content()
    context.close()


@pytest.mark.slow
def test_page_of_a_run_of_one_step_has_its_figures(visit, pages):
    page = visit(pages("one"))
    assert page.locator(".plot svg").count() == page.locator(".plot").count() > 2
