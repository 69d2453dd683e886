"""The report in a real browser: Chromium without network, at the width of a desk and of a phone, in light and dark."""

import importlib
import os
import shutil

import pytest
from helpers import RUN

SCHEMES = ("light", "dark")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
# What stands further right than the page is wide, and in nothing that scrolls by itself.
OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    const aside = element.closest('.scroll, pre, .sr, .skip, svg');
    return box.width && box.right > innerWidth + 1 && (!aside || aside === element && !element.matches('.sr, .skip'));
}).map(element => element.outerHTML.slice(0, 120))"""


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


# CI installs a browser, and says so: there a missing one is no reason to pass.
REQUIRED = bool(os.environ.get("LEVER_TEST_BROWSER"))


def needed(module: str):
    return importlib.import_module(module) if REQUIRED else pytest.importorskip(module)


@pytest.fixture(scope="module")
def browser():
    found = chromium()
    if found is None:
        assert not REQUIRED, "no Chromium: apt-get install chromium, or CHROMIUM=PATH"
        pytest.skip("no Chromium: apt-get install chromium, or CHROMIUM=PATH")
    sync_api = needed("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, compared_once):
    """open(width, scheme) → the page with what it logged and asked for."""
    contexts = []

    def opened(width: int = 1280, scheme: str = "light", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((compared_once / RUN / "report.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_and_can_be_read_by_all(opened, width, scheme):
    axe = needed("axe_playwright_python.sync_playwright")
    page = opened(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    violations = axe.Axe().run(page).response["violations"]
    assert [(found["id"], found["nodes"][0]["html"]) for found in violations] == []
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []


def test_colours_follow_the_scheme_and_print_is_on_white(opened):
    backgrounds = []
    for scheme in SCHEMES:
        page = opened(1280, scheme)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator(".filter").is_visible()
    assert backgrounds[0] != backgrounds[1]
    assert page.pdf().startswith(b"%PDF")


def test_every_picture_is_there_and_says_what_it_is(opened):
    page = opened()
    pictures = page.evaluate(
        "[...document.images].map(image => [image.alt, image.complete && image.naturalWidth, image.offsetWidth])"
    )
    assert len(pictures) > 24
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert all(alt.strip() and width for alt, width, _ in pictures)
    assert page.locator("svg[role=img]").count() == page.locator("svg[aria-label]").count() > 8


def test_on_a_phone_writing_is_large_enough_and_what_the_demonstrations_answer_is_seen_whole(opened):
    page = opened(390)
    heights = page.evaluate("""[...document.querySelectorAll('p, td, th, li, figcaption, svg text')]
        .filter(element => element.textContent.trim() && element.getClientRects().length)
        .map(element => element instanceof SVGElement
            ? element.getBoundingClientRect().height : parseFloat(getComputedStyle(element).fontSize))""")
    assert len(heights) > 100
    assert min(heights) >= 10
    table = page.get_by_role("region", name="Answers in the demonstrations, by method")
    assert table.evaluate("element => element.scrollWidth <= element.clientWidth")


def test_the_gallery_is_filtered_by_the_keyboard_without_scripts(opened):
    page = opened(java_script_enabled=False)
    counted = {kind: page.locator(f".card.{kind}").count() for kind in ("win", "loss", "sample")}
    assert sum(counted.values()) == page.locator(".card:visible").count() > 0
    assert counted["win"]
    page.locator("#all").focus()
    for kind in ("win", "loss", "sample"):
        page.keyboard.press("ArrowRight")
        assert page.locator(f"#{kind}").is_checked()
        assert page.locator(".card:visible").count() == page.locator(f".card.{kind}:visible").count() == counted[kind]
    page.keyboard.press("ArrowRight")
    assert page.locator(".card:visible").count() == sum(counted.values())


def test_tab_begins_at_the_way_to_the_results_and_opens_what_is_folded(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    summary = page.locator("details:not([open]) > summary").first.element_handle()
    summary.focus()
    page.keyboard.press("Enter")
    assert summary.evaluate("element => element.parentElement.open")
    assert summary.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
