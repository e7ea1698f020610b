"""page.py: what its HTML says, and how a browser shows it."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from browser import look, open_browser, open_page
from matplotlib.figure import Figure
from PIL import Image

from lab import page
from prompts import Answer
from samples import Truth

HOSTILE = "\"'><img src=x onerror=alert(1)></script><script>document.title = 'x'</script>&amp;\x00"
TRUTH = Truth((1, 2), {1: (0.1, 0.2, 0.5, 0.8), 2: (0.2, 0.2, 0.6, 0.8)})
ANSWER = Answer(2, 3, ((2, (0.25, 0.5, 0.75, 1.0)),), ((2, (0.2, 0.2, 0.6, 0.8)), (3, (0.9, 0.5, 0.4, 0.6))))


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


class Tables(HTMLParser):
    """The tables of a page as lists of rows of cells' texts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def draw(title="curves", values=(1, 3, 2)):
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.plot(values, "o-", label="a curve")
    axes.fill_between([0, 2], [1, 1], [2, 3], alpha=0.2)
    axes.legend()
    return figure


def element(text):
    """The root of a piece of HTML that is XML as well."""
    return ElementTree.fromstring(text)


# ----------------------------------------------------------------------------------------------------------
# Text and tables


def test_cells_come_back_as_they_were():
    rows = [[HOSTILE, 1.234, None], ["b", -0.5, 7], ["c", 1e-4, 8]]
    ((heads, *cells),) = Tables(page.table(["<name>", "value", "N"], rows)).tables
    assert heads == ["<name>", "value", "N"]
    assert cells == [
        [HOSTILE.replace("\x00", "\ufffd"), "1.23", "-"],
        ["b", "-0.50", "7"],
        ["c", "0.0001", "8"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (2.0, "2.00"), (3, "3"), (0.004, "0.004"), (123456.0, "1.2e+05"), ("5.0", "5.0")],
)
def test_numbers(value, text):
    assert page.number_text(value) == text


def test_columns_of_numbers_are_flush_right():
    text = page.table(["name", "number", "share"], [["a", 1.0, "5 %"], ["b", None, "-7.5 %"]])
    assert re.findall(r'<td( class="number")?>', text) == ["", ' class="number"', ' class="number"'] * 2
    assert 'class="number"' not in page.table(["number"], [])


def test_text_is_escaped_everywhere():
    parts = (page.paragraph, page.heading, page.verbatim, page.section, lambda t: page.details(t, name=t))
    for part in parts:
        assert "<img" not in part(HOSTILE) and "<script" not in part(HOSTILE)
    text = page.document(HOSTILE, "")
    assert "<img" not in text and text.count("<script") == 1 and "\x00" not in text


def test_a_document_needs_nothing_else():
    text = page.document("t", page.figure_svg(draw()) + page.strip("a", np.zeros((2, 8, 8, 3), np.uint8)))
    assert not re.search(r"https?:|@import|\ssrc=", text)
    linked = re.findall(r'href="([^"]*)"', text)
    assert len(linked) > 2 and all(link.startswith(("#", "data:")) for link in linked)


# ----------------------------------------------------------------------------------------------------------
# Figures


def test_ids_of_two_figures_differ_and_lead_where_they_should():
    svgs = [page.figure_svg(figure) for figure in (draw(), draw("others", (5, 3, 1)))]
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in svgs]
    assert len(ids[0]) == len(ids[1]) > 0 and len(set(ids[0] + ids[1])) == 2 * len(ids[0])
    for svg, names in zip(svgs, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', svg)) == set(names)
    assert page.figure_svg(draw()) == svgs[0]  # the same figure is the same text


def test_text_of_a_figure_stays_text():
    svg = element(page.figure_svg(draw("a < b & c")))
    texts = [node.text for node in svg.iter("text")]
    assert {"a < b & c", "a curve"} <= set(texts)
    assert "width" not in svg.attrib and svg.attrib["viewBox"] == "0 0 288 216"  # 4 x 3 inches in points


# ----------------------------------------------------------------------------------------------------------
# Boxes on frames


def test_a_strip_holds_its_frames():
    frames = np.repeat(np.arange(0, 250, 50, np.uint8), 40 * 60 * 3).reshape(5, 40, 60, 3)
    svg = element(page.strip("a", frames))
    (image,) = svg.iter("image")
    assert (image.attrib["width"], image.attrib["height"]) == ("300", "40")
    head, data = image.attrib["href"].split(",")
    assert head == "data:image/png;base64"  # the smaller of the two here
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert (pixels.reshape(40, 5, 60, 3).swapaxes(0, 1) == frames).all()
    noise = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert "data:image/jpeg;base64" in page.strip("a", noise)


def rectangles(text):
    """name -> [(left, top, right, bottom)] of the lines around boxes, in pixels of the row."""
    found = {}
    for node in element(text).iter("rect"):
        if "box" in node.attrib.get("class", ""):
            x, y, w, h = (float(node.attrib[key]) for key in ("x", "y", "width", "height"))
            found.setdefault(node.attrib["class"].split()[1], []).append((x, y, x + w, y + h))
    return found


def test_boxes_stand_where_they_should():
    """Cells of 60 pixels: step 1 begins at 60, step 2 at 120; lines run 1 outside, 1 and 3 inside a box."""
    found = rectangles(page.tubes(TRUTH, ANSWER, [0, 1, 2, 3]))
    assert found == {
        "truth": [(65, 11, 91, 49), (131, 11, 157, 49)],
        "think": [(136, 31, 164, 59)],
        "pred": [(135, 15, 153, 45)],  # that of step 3 is flipped
    }
    assert rectangles(page.tubes(TRUTH, None, [1])) == {"truth": [(5, 11, 31, 49)]}


@pytest.mark.parametrize(("aspect", "size"), [(1.0, (60, 60)), (2.25, (90, 40)), (0.25, (30, 120))])
def test_frames_of_any_shape_have_one_area(aspect, size):
    assert page.cell(aspect) == size
    whole = Truth((0, 0), {0: (0.0, 0.0, 1.0, 1.0)})
    text = page.tubes(whole, None, [0], aspect=aspect)
    assert rectangles(text)["truth"] == [(-1, -1, size[0] + 1, size[1] + 1)]
    (svg,) = element(text).iter("svg")
    left, top, width, _ = map(float, svg.attrib["viewBox"].split())
    assert left <= -2 and top <= -2 and left + width >= size[0] + 2  # the line is all in it
    assert float(svg.attrib["width"]) == width == page.row_width(1, aspect)


def test_a_box_too_small_for_its_outlines_is_drawn():
    tiny = (0.5, 0.5, 0.501, 0.501)
    answer = Answer(0, 0, ((0, tiny),), ((0, tiny),))
    found = rectangles(page.tubes(Truth((0, 0), {0: tiny}), answer, [0]))
    for name in page.COLOURS:
        ((left, top, right, bottom),) = found[name]
        assert 28 < left < right < 32 and 28 < top < bottom < 32


def test_bars_mark_the_spans():
    def fills(answer):
        nodes = element(page.tubes(TRUTH, answer, [0, 1, 2, 3])).iter("rect")
        bars = [node.attrib for node in nodes if node.attrib.get("height") == str(page.BAR)]
        rows = sorted({float(bar["y"]) for bar in bars})
        return [[bar["fill"] for bar in bars if float(bar["y"]) == y] for y in rows]

    green, red, pale = "#009628", "#e11414", "#e2e2e2"
    assert fills(ANSWER) == [[pale, green, green, pale], [pale, pale, red, red]]
    assert fills(None) == [[pale, green, green, pale], [pale] * 4]


# ----------------------------------------------------------------------------------------------------------
# In a browser


def write(folder, *parts, title="t"):
    path = folder / "page.html"
    path.write_text(page.document(title, "\n".join(parts)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_in_a_browser(driver, tmp_path, width):
    frames = np.full((12, 40, 60, 3), 90, np.uint8)
    table = page.table([f"column {k}" for k in range(30)], [[HOSTILE, *[0.5] * 29]])
    row = page.tubes(TRUTH, ANSWER, list(range(12)), "a", 1.5)
    figures = [page.figure_svg(draw(str(k), (k, 2, 1))) for k in range(3)]
    long = page.paragraph("x" * 500) + page.verbatim("y" * 500)
    path = write(
        tmp_path,
        page.section(HOSTILE, table, page.strip("a", frames), page.grid(*figures), page.wide(figures[0])),
        page.details("more", page.grid(row, row, least=page.row_width(12, 1.5)), long, name=HOSTILE),
        title=HOSTILE,
    )
    assert look(driver, path, width) == []
    assert driver.title.startswith("\"'><img src=x onerror=alert(1)></script>")
    lefts = driver.execute_script(
        "return [...document.querySelectorAll('.grid svg.figure')].map(f => f.getBoundingClientRect().left)"
    )
    assert len(set(lefts)) == (3 if width == 1280 else 1)


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ('<div style="width:2000px">.</div>', "sideways"),
        ('<table style="font-size:9px"><tr><td>small text</td></tr></table>', "text of 9 px: small text"),
        ('<svg class="figure" viewBox="0 0 9 9" style="width:5px"></svg>', "nothing to see"),
        ("<script>nothing()</script>", "nothing is not defined"),
        ('<img src="http://example.org/a.png">', "example.org"),
    ],
)
def test_the_browser_finds_what_is_wrong(driver, tmp_path, flaw, said):
    assert any(said in line for line in look(driver, write(tmp_path, flaw), 390))


def test_the_frames_show_behind_the_boxes(driver, tmp_path):
    """From the screen: in each cell the colour of its frame, lightened, and a line where the box is."""
    colours = [(250, 0, 0), (0, 200, 0), (0, 0, 100)]
    frames = np.array([np.broadcast_to(np.uint8(colour), (20, 20, 3)) for colour in colours])
    truth = Truth((1, 1), {1: (0.25, 0.25, 0.75, 0.75)})
    path = write(tmp_path, page.strip("a", frames), page.tubes(truth, None, [0, 1, 2], "a"))
    open_page(driver, path, 1280)
    place = driver.execute_script(
        "const r = document.querySelector('svg.tubes').getBoundingClientRect(); return [r.left, r.top]"
    )
    shot = np.asarray(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")).astype(int)
    left, top = (round(value) + page.EDGE for value in place)
    for k, colour in enumerate(colours):
        expected = 255 - (255 - np.array(colour)) * page.LIGHT
        assert abs(shot[top + 30, left + 60 * k + 30] - expected).max() <= 3
    assert abs(shot[top + 30, left + 60 + 14] - page.COLOURS["truth"]).max() <= 3  # box 75 to 105, 2 outside
    assert abs(shot[top + 30, left + 60 + 17] - (102, 222, 102)).max() <= 3


def test_a_click_sorts_a_table(driver, tmp_path):
    rows = [["b", 10.0], ["a", 9.0], ["c", -1.5], ["d", None]]
    open_page(driver, write(tmp_path, page.table(["name", "value"], rows, sortable=True)), 390)
    cells = (
        "return [...document.querySelectorAll('tbody td:first-child')].map(cell => cell.textContent).join('')"
    )
    for head, expected in ((2, "cdab"), (2, "badc"), (1, "abcd"), (1, "dcba")):
        driver.execute_script(f"document.querySelector('th:nth-child({head})').click()")
        assert driver.execute_script(cells) == expected
