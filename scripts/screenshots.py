"""Take the pictures of docs/images of a report in headless Chromium.

    lever demo && python scripts/screenshots.py results/digits/model_cpk/demo/report.html
    python scripts/screenshots.py REPORT --cards digits_sets      # three wins alone

Needs Chromium on the path (or CHROMIUM=PATH) and playwright, which the `dev` extra installs.
"""

import argparse
import io
import os
import shutil
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH = 1180  # of the window on a desk
# Three wins over random side by side, of queries that no pick answers by itself.
TELLING = ".win:not(:has(> .icds .right))"
THREE = f"""
.cards {{ grid-template-columns: repeat(3, 1fr); }}
.card:not({TELLING}), .card:nth-child(n + 4 of {TELLING}) {{ display: none; }}
"""
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--to", type=Path, default=IMAGES)
    parser.add_argument("--cards", metavar="NAME", help="three wins over random alone, as NAME.png")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    options.to.mkdir(parents=True, exist_ok=True)
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(options.report.resolve().as_uri())
        if options.cards:
            page.add_style_tag(content=THREE)
            save(clip(page, ".cards", ".cards"), options.to / f"{options.cards}.png")
            return
        head, cards = clip(page, "body", "#accuracy ~ .pair"), clip(page, ".card", ".card:nth-child(2)")
        save(stacked(head, cards), options.to / "report.png")
        save(clip(page, "#choices", ".card:nth-child(2)"), options.to / "gallery.png")
        page.emulate_media(color_scheme="dark")
        save(clip(page, "#training", "#training ~ .grid >> nth=1"), options.to / "training.png")
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page.goto(options.report.resolve().as_uri())
        page.locator("#win").check()
        page.locator(".card").first.scroll_into_view_if_needed()
        page.evaluate("document.querySelector('.card').scrollIntoView()")
        save(read(page.screenshot()), options.to / "phone.png")
        browser.close()


def clip(page, first: str, last: str) -> Image.Image:
    """Return a picture of the page from one element to another."""
    top, bottom = (page.locator(one).first.bounding_box() for one in (first, last))
    height = bottom["y"] + bottom["height"] + 12 - top["y"]
    area = {"x": 0, "y": max(0, top["y"] - 4), "width": WIDTH, "height": height}
    return read(page.screenshot(full_page=True, clip=area))


def read(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def stacked(*images: Image.Image) -> Image.Image:
    """Return the pictures one above the other."""
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)))
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole


def save(image: Image.Image, path: Path) -> None:
    """Save a picture in 256 colours: a third of the bytes, and hardly a difference to the eye."""
    colours = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    image.quantize(256, **colours).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
