"""Building blocks of a self-contained HTML page: one file that needs no network, no server and no script but
the few lines in it. Used by visualize.py (pictures of a run) and bench.py (answers that were scored again).

Every function returns HTML as text. What comes from files (sentences, answers, names) goes through escape;
paragraph, table and the titles do that themselves. Wide things scroll sideways in a box of their own, and a
grid has as many columns as fit, so the page reads on a screen and on a phone.
"""

import base64
import hashlib
import html
import io
import re
from typing import TYPE_CHECKING

import numpy as np

from prompts import Answer
from rewards import is_valid
from samples import Truth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"truth": (0, 150, 40), "think": (30, 90, 255), "pred": (225, 20, 20)}  # STVG-o1, Fig. 3; RGB
LIGHT = 0.6  # what is left of a frame's contrast with white, so that outlines show on any colour


def hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


# ----------------------------------------------------------------------------------------------------------
# The document

STYLE = f"""
:root {{ color-scheme: light; --truth: {hexadecimal(COLOURS["truth"])};
  --think: {hexadecimal(COLOURS["think"])}; --pred: {hexadecimal(COLOURS["pred"])}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 82rem; background: #fff; color: #1c1f23;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid #d5d9de; }}
h3 {{ font-size: 1rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }}
p {{ margin: .4rem 0; max-width: 60rem; overflow-wrap: anywhere; }}
pre {{ margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; }}
.scroll {{ overflow-x: auto; }}
.grid {{ display: grid; gap: .8rem 1.4rem; grid-template-columns: 1fr; }}
.grid > * {{ min-width: 0; }}
@media (max-width: 600px) {{ body {{ padding: .6rem; }} }}
@media (min-width: 800px) {{
  .grid {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }} }}
table {{ border-collapse: collapse; margin: .4rem 0; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .6rem .2rem 0; text-align: left; vertical-align: top; }}
th {{ border-bottom: 1px solid #9aa1a9; font-weight: 600; white-space: nowrap; }}
td {{ border-bottom: 1px solid #e8ebee; }}
th.number, td.number {{ text-align: right; white-space: nowrap; }}
table.sortable th {{ cursor: pointer; }}
details {{ margin: .3rem 0; }}
summary {{ cursor: pointer; overflow-wrap: anywhere; }}
details.part > summary {{ font-weight: 600; padding: .35rem .6rem; background: #eef1f4; }}
.truth {{ color: var(--truth); }} .think {{ color: var(--think); }} .pred {{ color: var(--pred); }}
svg {{ display: block; }}
svg.figure {{ width: 100%; height: auto; }}
svg.figure * {{ stroke-linejoin: round; stroke-linecap: butt; }}
svg.figure text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif
  !important; }}
svg.tubes {{ margin: .2rem 0; font-size: 11px; }}
svg.tubes text {{ fill: #59616a; text-anchor: middle; }}
svg.tubes rect.box {{ fill: none; stroke-width: 2; }}
svg.tubes rect.truth {{ stroke: var(--truth); }} svg.tubes rect.think {{ stroke: var(--think); }}
svg.tubes rect.pred {{ stroke: var(--pred); }}
svg.strip {{ position: absolute; }}
"""
# A click on a head of a sortable table sorts its rows by that column, and turns them round the next time.
SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], k = head.cellIndex, sign = head.dataset.sign = -head.dataset.sign || 1;
  const value = row => row.cells[k].textContent, number = row => parseFloat(value(row));
  const order = head.classList.contains("number") ? (a, b) => (number(a) || 0) - (number(b) || 0)
    : (a, b) => value(a).localeCompare(value(b));
  body.append(...[...body.rows].sort((a, b) => sign * order(a, b)));
};
"""  # noqa: E501


def document(title: str, body: str) -> str:
    """The whole page. title: text. body: HTML, such as of section."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Text for HTML, also within a quoted attribute. Control characters that HTML forbids become U+FFFD."""
    return html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(text)))


def section(title: str, *parts: str) -> str:
    """A headed part of the page. parts: HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def heading(text: str) -> str:
    """Of a part of a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def verbatim(text: str) -> str:
    """An answer, say, as it stands; its lines are broken where they do not fit."""
    return f"<pre>{escape(text)}</pre>"


def grid(*parts: str, least: int = 380) -> str:
    """Parts beside one another, as many columns as fit with `least` pixels each; one on a narrow screen."""
    cells = "\n".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="grid" style="--least:{least}px">\n{cells}\n</div>'


def wide(part: str, least: int = 740) -> str:
    """A part that is not squeezed below `least` pixels: on a narrow screen it scrolls in a box of its own."""
    sizes = f"min-width:{least}px;max-width:{1.25 * least:g}px"
    return f'<div class="scroll"><div style="{sizes}">{part}</div></div>'


def details(summary: str, *parts: str, name: str = "", shown: bool = False) -> str:
    """A part that is folded away. name: of those that share one, a single part is open at a time, and their
    summaries look like the heads of parts. shown: it begins open."""
    group = f' name="{escape(name)}" class="part"' if name else ""
    return (
        f"<details{group}{' open' if shown else ''}><summary>{escape(summary)}</summary>\n"
        + "\n".join(parts)
        + "\n</details>"
    )


def table(heads: list[str], rows: list[list], sortable: bool = False) -> str:
    """A table in a box that scrolls. Cells are text or numbers, None is "-" (number_text); a column whose
    cells all look like numbers is set flush right. sortable: by a click on a head."""
    rows = [[number_text(cell) for cell in row] for row in rows]
    numeric = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?( ?%)?|-|")
    kinds = [
        ' class="number"' if rows and all(numeric.fullmatch(cell) for cell in column) else ""
        for column in (zip(*rows, strict=True) if rows else [()] * len(heads))
    ]

    def line(tag: str, cells: list[str]) -> str:
        marked = zip(cells, kinds, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{escape(cell)}</{tag}>' for cell, kind in marked)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}>\n<thead>{line("th", heads)}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def number_text(value: object) -> str:
    """How a cell is written: a float with two decimals, or two digits where it is small or very large."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    plain = value == 0 or 0.005 <= abs(value) < 1e5
    return f"{value:.2f}" if plain else f"{value:.2g}"


# ----------------------------------------------------------------------------------------------------------
# Figures


def figure_svg(figure: "Figure") -> str:
    """A figure of matplotlib as SVG that is as wide as its box. Its text stays text.

    Matplotlib's ids are the same in every figure, and within one page the first would win: those that are
    used get the figure's own prefix, the others go.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")  # without the head of an XML file
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    size = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = re.sub(r"<svg[^>]*>", f'<svg class="figure" role="img" viewBox="{size}">', svg, count=1)
    prefix = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg))
    used = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)


# ----------------------------------------------------------------------------------------------------------
# Boxes on frames

SIDE = 60  # pixels of the page: side of a square frame; others have the same area
BAR, LINE = 5, 16  # height of the bars that mark the spans, and of a line of numbers
EDGE = 2  # around the frames, for outlines


def cell(aspect: float) -> tuple[float, float]:
    """(width, height) of a frame on the page. aspect: width / height of its video."""
    return SIDE * aspect**0.5, SIDE / aspect**0.5


def row_width(steps: int, aspect: float) -> int:
    """Pixels that tubes takes for so many frames."""
    return round(steps * cell(aspect)[0] + 2 * EDGE)


def legend() -> str:
    """What the colours of tubes mean."""
    words = {"truth": "truth", "think": "think boxes", "pred": "pred boxes"}
    boxes = ", ".join(f'<b class="{name}">{text}</b>' for name, text in words.items())
    return f"<p>{boxes}. Bars: steps of the true and of the answered span. Numbers: steps.</p>"


def strip(name: str, frames: np.ndarray) -> str:
    """The frames of a clip side by side, one picture that any number of tubes may show. It shows nothing
    where it stands itself.

    name: by which tubes refers to it. frames: uint8 (T, H, W, 3), no larger than need be. Needs pillow.
    """
    from PIL import Image

    count, height, width, _ = frames.shape
    image = Image.fromarray(np.concatenate(list(frames), axis=1))  # (H, T * W, 3)
    pictures = {}
    for kind, quality in (("png", {}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        image.save(file, format=kind, **quality)
        pictures[kind] = base64.b64encode(file.getvalue()).decode()
    kind = min(pictures, key=lambda kind: len(pictures[kind]))
    return (
        f'<svg class="strip" width="0" height="0" aria-hidden="true"><symbol id="{_strip_id(name)}"'
        f' viewBox="0 0 {count * width} {height}" preserveAspectRatio="none"><image width="{count * width}"'
        f' height="{height}" href="data:image/{kind};base64,{pictures[kind]}"/></symbol></svg>'
    )


def _strip_id(name: str) -> str:
    return "strip-" + hashlib.sha256(name.encode()).hexdigest()[:10]


def tubes(truth: Truth, answer: Answer | None, steps: list[int], strip: str = "", aspect: float = 1.0) -> str:
    """One answer on a row of frames: the boxes of those steps, outlines inside one another (truth, think,
    pred) so that equal boxes are all seen; under each frame a bar in the colour of the truth where the step
    is in the true span, and one in that of pred where it is in the answered one.

    answer: its boxes in [0, 1]; None for an answer that does not parse. A box without an inside is not drawn.
    strip: the name of a strip with the frames of these steps; without one the cells are grey. aspect: width /
    height of a frame.
    """
    width, height = cell(aspect)
    boxes = {"truth": truth.boxes}
    spans = {"truth": truth.span}
    if answer is not None:
        boxes |= {"think": answer.think_boxes, "pred": answer.pred_boxes}
        spans |= {"pred": answer.span}
    whole = len(steps) * width, height + 2 * (BAR + 1) + LINE
    frames = f'<rect width="{whole[0]:.5g}" height="{height:.5g}" fill="#d9dce0"/>'
    if strip:
        place = f'width="{whole[0]:.5g}" height="{height:.5g}"'
        frames = f'<use href="#{_strip_id(strip)}" {place} opacity="{LIGHT}"/>'
    parts = [frames]
    for k, step in enumerate(steps):
        left = k * width
        if k:
            parts.append(f'<rect x="{left - 1:.5g}" width="2" height="{height:.5g}" fill="#fff"/>')
        for row, name in enumerate(("truth", "pred")):
            first, last = spans.get(name, (0, -1))
            colour = hexadecimal(COLOURS[name]) if first <= step <= last else "#e2e2e2"
            top = height + 1 + row * (BAR + 1)
            place = f'x="{left + 1:.5g}" y="{top:.5g}" width="{width - 2:.5g}" height="{BAR}"'
            parts.append(f'<rect {place} fill="{colour}"/>')
        words = f"step {step}" if k == 0 and width >= 40 else step
        parts.append(f'<text x="{left + width / 2:.5g}" y="{whole[1] - 3:.5g}">{words}</text>')
    for k, step in enumerate(steps):  # over all frames: an outline at the edge of one reaches beyond it
        for inset, (name, items) in zip((-1, 1, 3), boxes.items(), strict=False):
            if step in items and is_valid(items[step]):
                parts.append(_outline(name, items[step], k * width, width, height, inset))
    spoken = ", ".join(f"{name} steps {first} to {last}" for name, (first, last) in spans.items())
    size = [f"{whole[0] + 2 * EDGE:.5g}", f"{whole[1] + EDGE:.5g}"]
    return (
        f'<div class="scroll"><svg class="tubes" role="img" aria-label="{spoken}" width="{size[0]}"'
        f' height="{size[1]}" viewBox="{-EDGE} {-EDGE} {size[0]} {size[1]}">{"".join(parts)}</svg></div>'
    )


def _outline(name: str, box: tuple, left: float, width: float, height: float, inset: float) -> str:
    """A box as a line that lies `inset` pixels inside it; with no room for that, along its middle."""
    x1, y1, x2, y2 = (value * (width, height)[k % 2] for k, value in enumerate(box))
    inset = min(inset, (x2 - x1) / 2, (y2 - y1) / 2)
    x, y, w, h = left + x1 + inset, y1 + inset, x2 - x1 - 2 * inset, y2 - y1 - 2 * inset
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0.1):.1f}" height="{max(h, 0.1):.1f}"'
    return f'<rect class="box {name}" {place}/>'
