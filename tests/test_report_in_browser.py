"""The committed reports in headless Chromium, as a reader has them: narrow and wide, light and dark."""

import copy
import json
import re
import shutil

import compare_pages
import picture
import pytest
from playwright.sync_api import Error, sync_playwright
from test_compare import HOSTILE, poisoned

from vq_kvcache.report_page import SECTIONS, page

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
REPORTS = sorted(compare_pages.RESULTS.glob("compare-*.html"))
SIZES = {"phone": (360, 740), "desktop": (1280, 800)}


@pytest.fixture(scope="module")
def browser():
    """Chromium of this machine, or Playwright's own; a failure where there is neither."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except Error as error:
            pytest.fail(f"no browser ({error}); expected one of {BROWSERS}; install chromium.")
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a file; gives the page, and what it logged, asked for or ran."""
    contexts = []

    def opened(file, size, scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        tab, seen = context.new_page(), []
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: seen.append(request.url))
        tab.goto(file.as_uri(), wait_until="load")
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return tab, seen

    yield opened
    for context in contexts:
        context.close()


def luminance(colour):
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS = """[...document.querySelectorAll(`section p, section td, section th, figcaption, caption, .dim, mark, del,
    svg text, summary, nav a`)].map(e => {
  let back = e;
  while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
  const own = getComputedStyle(e);
  return [e instanceof SVGElement ? own.fill : own.color, getComputedStyle(back).backgroundColor];
})"""


def test_both_reports_are_there_and_those_of_their_figures():
    assert [file.name for file in REPORTS] == ["compare-small-qwen3.html", "compare-tiny-llama.html"]
    for file in REPORTS:
        figures = json.loads(file.with_suffix(".json").read_text("utf-8"))
        assert file.read_text("utf-8") == page(figures), "benchmarks/compare_pages.py writes it again"
        assert file.stat().st_size < 1_000_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_a_report_is_readable(file, size, scheme, visit, tmp_path):
    tab, seen = visit(file, size, scheme)
    assert seen == [file.as_uri()]  # nothing else was loaded, and nothing complained of
    width = SIZES[size][0]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .sr, svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    for name in SECTIONS:
        box = tab.locator(f"section#{name}").bounding_box()
        assert box["height"] > 100
        assert box["width"] > 0.8 * min(width, 1000)
    images = tab.evaluate("[...document.querySelectorAll('svg[role=img]')].map(e => e.getBoundingClientRect().height)")
    assert len(images) > 15
    assert min(images) > 20
    pairs = tab.evaluate(COLOURS)
    assert len(pairs) > 200
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    background = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert background > 0.8 if scheme == "light" else background < 0.05
    picture = tab.screenshot(path=str(tmp_path / "page.png"))
    assert len(picture) > 50_000


def test_tables_scroll_in_their_own_box_and_by_keyboard(visit):
    tab, _ = visit(REPORTS[0], "phone")
    box = tab.locator("#summary .scroll")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    assert box.get_attribute("tabindex") == "0"
    box.focus()
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_timeout(500)  # scrolling is smooth, and the page's policy forbids Playwright's own waiting
    assert box.evaluate("e => e.scrollLeft") > 0
    assert tab.evaluate("document.documentElement.scrollLeft") == 0


def test_the_caption_of_a_wide_table_is_read_without_scrolling(visit):
    tab, _ = visit(REPORTS[0], "phone")
    ends = "e => [e.querySelector('caption span').getBoundingClientRect().right, e.getBoundingClientRect().right]"
    boxes = tab.locator(".scroll").all()
    assert len(boxes) > 8
    for box in boxes:
        for _ in range(2):
            words, edge = box.evaluate(ends)
            assert words <= edge
            box.evaluate("e => { e.scrollLeft = 1000 }")
    assert any(box.evaluate("e => e.scrollLeft") > 100 for box in boxes)


def test_smallest_text_of_a_figure_is_legible_on_a_phone(visit):
    tab, _ = visit(REPORTS[0], "phone")
    sizes = tab.evaluate("""[...document.querySelectorAll('svg text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)""")
    assert min(sizes) >= 9


CUT = """[...document.querySelectorAll('svg[role=img] text')].filter(e => {
  const box = e.getBBox(), image = e.ownerSVGElement.viewBox.baseVal, rest = 0.2 * box.height;
  return box.x < 0 || box.x + box.width > image.width || box.y < -rest || box.y + box.height > image.height + rest;
}).map(e => e.textContent)"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_no_letter_of_a_figure_is_cut_off(file, size, visit):
    tab, _ = visit(file, size)
    assert tab.evaluate(CUT) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_of_the_method_is_readable(scheme, visit):
    tab, seen = visit(picture.FILE, "phone", scheme)
    assert seen == [picture.FILE.as_uri()]
    assert tab.evaluate(CUT) == []
    width = tab.evaluate("document.documentElement.viewBox.baseVal.width")
    fills = "[...document.querySelectorAll('{}')].map(e => [getComputedStyle(e).fill, getComputedStyle(e).fontSize])"
    texts = tab.evaluate(fills.format("text"))
    ((ground, _),) = tab.evaluate(fills.format(".page"))
    assert luminance(ground) > 0.8 if scheme == "light" else luminance(ground) < 0.05
    for colour, size in texts:
        assert contrast(colour, ground) >= 4.5
        assert float(size.removesuffix("px")) * 360 / width >= 7
    shades = [contrast(tab.evaluate(fills.format(f".w{bits}"))[0][0], ground) for bits in range(9)]
    assert shades == sorted(shades)  # more bits stand out more
    assert shades[1] > 1.5
    assert shades[4] > 3


def test_hostile_text_stays_text(visit, tmp_path):
    report = json.loads(REPORTS[0].with_suffix(".json").read_text("utf-8"))
    evil = copy.deepcopy(report)
    for name in ("model", "text", "prompt", "machine", "codec", "fingerprint", "missing"):
        evil[name] = poisoned(evil[name]) or HOSTILE
    for m in evil["methods"]:
        m["name"] = f"spectral {HOSTILE}"
        m["continuation"]["pieces"] = [["same", HOSTILE], ["other", HOSTILE], ["missing", HOSTILE]]
    file = tmp_path / "evil.html"
    file.write_text(page(evil), "utf-8")
    tab, seen = visit(file, "phone")
    assert seen == [file.as_uri()]
    assert tab.title() == f"KV caches of {HOSTILE}"
    assert tab.locator("b, script").count() == 0
    assert HOSTILE in tab.locator(".prompt").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
