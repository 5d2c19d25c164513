"""The report in a real browser, headless Chromium, without network."""

import importlib.util
import shutil

import pytest
from planted import EVIL, plant

from timm_convnextv2.report.html import write_report

if importlib.util.find_spec("playwright") is None:
    pytest.skip("the package playwright is not installed: pip install -e '.[browser]'", allow_module_level=True)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

NOT_LOADED = "[...document.images].filter(image => !image.naturalWidth).map(image => image.alt)"
SHOWN = "[...document.querySelectorAll('.viewer img')].filter(i => i.checkVisibility()).map(i => i.dataset.epoch)"
WIDTH = "document.documentElement.scrollWidth"
WIDE = "[...document.querySelectorAll('section svg, section img, section table')].filter(e => !e.closest('.scroll') && "
WIDE += "e.getBoundingClientRect().right > innerWidth).length"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report of two runs, whose names and files try to run a script."""
    root = tmp_path_factory.mktemp("runs")
    runs = [plant(root / "<script>alert(1)<" / "first"), plant(root / "<img src=x onerror=alert(2)>", 3, full=False)]
    write_report(runs, root / "report.html")
    return (root / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the report; what its console says, and what it asks of the network, must be nothing."""
    said, opened = [], []

    def visit(width=1200, scheme="light", **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("data:", address)) or said.append(request.url))
        page.goto(address)
        return page

    yield visit
    for page in opened:
        page.close()
    assert not said


def test_it_renders_and_nothing_else_runs(visit):
    page = visit()
    assert page.evaluate(NOT_LOADED) == [] and page.evaluate("document.images.length") == 6 + 3 + 2
    assert page.title().startswith("Pretraining of first, <img src=x onerror=alert(2)>")
    assert EVIL in page.inner_text("body") and page.evaluate("document.scripts.length") == 1
    sizes = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(sizes) == 11 and min(sizes) > 100


def test_a_script_that_came_through_would_not_run(browser, address):
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    page.evaluate("const s = document.createElement('script'); s.textContent = 'ran = 1'; document.body.append(s)")
    assert page.evaluate("typeof ran") == "undefined" and "Content Security Policy" in said[0]
    page.close()


def test_the_slider_changes_the_image(visit):
    page = visit()
    first, second = page.get_by_role("slider", name="Epoch").all()
    assert page.evaluate(SHOWN) == ["6", "3"] and first.get_attribute("aria-valuetext") == "epoch 6"
    first.focus()
    page.keyboard.press("Home")
    assert page.evaluate(SHOWN) == ["1", "3"] and page.inner_text("output >> nth=0") == "1"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(SHOWN) == ["2", "3"] and first.get_attribute("aria-valuetext") == "epoch 2"
    second.fill("0")
    assert page.evaluate(SHOWN) == ["2", "1"]


def test_a_button_copies_its_command(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.locator(".copy").first
    button.click()
    page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".command code").first.inner_text()


def test_without_scripts_the_last_image_is_shown(visit):
    page = visit(java_script_enabled=False)
    visible = [image.get_attribute("data-epoch") for image in page.locator(".viewer img").all() if image.is_visible()]
    assert visible == ["6", "3"] and not any(s.is_visible() for s in page.locator(".slider").all())


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_window(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate(WIDTH) == width and page.evaluate(WIDE) == 0


def brightness(page, selector, of):
    colour = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{of}")
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / (3 * 255)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme(visit, scheme):
    page = visit(scheme=scheme)
    pairs = [("body", "backgroundColor"), ("section", "backgroundColor")], [("body", "color"), ("svg text", "fill")]
    back, front = ([brightness(page, *pair) for pair in side] for side in pairs)
    if scheme == "dark":
        assert max(back) < 0.2 and min(front) > 0.6
    else:
        assert min(back) > 0.9 and max(front) < 0.5
