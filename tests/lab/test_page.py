"""lab/page.py and page.html: what the page of a run says, and how a browser shows it."""

import html
import io
import json
import re
import shutil

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread
from run_folder import make_run, record_of

from config import load_config
from lab import bench, page
from lab.pictures import draw_run
from runtime.files import read_jsonl, write_jsonl

HOSTILE = "\"'><img src=x onerror=alert(1)></script><script>document.title = 'x'</script>{{ 1 }}&amp;"

LOOK = """
for (const part of document.querySelectorAll("details")) part.open = true;
const found = [], root = document.documentElement;
if (root.scrollWidth > innerWidth) found.push(`it scrolls sideways: ${root.scrollWidth} > ${innerWidth}`);
for (const part of document.querySelectorAll("img, table, .frames")) {
  const { width, height } = part.getBoundingClientRect();
  if (!(width > 20 && height > 20)) found.push(`nothing to see: ${part.outerHTML.slice(0, 60)}`);
}
for (const text of document.querySelectorAll("td, th, p, span, pre"))
  if (!(parseFloat(getComputedStyle(text).fontSize) > 10.9)) found.push(`small text: ${text.textContent}`);
for (const { name } of performance.getEntriesByType("resource"))
  if (!name.startsWith("data:")) found.push(`wants ${name}`);
return found;
"""


def tables_of(text):
    """The tables of a page as lists of rows of cells' texts."""
    tables = [re.findall(r"<tr>(.*?)</tr>", t, re.S) for t in re.findall(r"<table>(.*?)</table>", text, re.S)]
    cells = [[re.findall(r"<t[dh].*?>(.*?)</t", row) for row in table] for table in tables]
    return [[[html.unescape(cell) for cell in row] for row in table] for table in cells]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a finished run; its first video is missing, its second sentence and answer are hostile."""
    folder = tmp_path_factory.mktemp("drawn")
    run = make_run(folder)
    (run / "summary.json").write_text("{}")
    (folder / "videos" / "0.y4m").unlink()
    annotations = json.loads((folder / "all.json").read_text())
    annotations["1.y4m"]["caption"] = HOSTILE
    (folder / "all.json").write_text(json.dumps(annotations))
    records = read_jsonl(run / "predictions.jsonl")
    records[1] = record_of(HOSTILE, "1.y4m")
    write_jsonl(records, run / "predictions.jsonl")
    return draw_run(run)[0]


@pytest.fixture(scope="module")
def driver():
    """A browser without a window and without a network; without a browser the tests are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: requirements-dev.txt")
    chromium = shutil.which("google-chrome") or shutil.which("chromium")
    if not (chromium and shutil.which("chromedriver")):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)  # root has no sandbox, and a container little shared memory
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def look(driver, path, width):
    """Open a page in a window `width` pixels wide; return what a reader would complain of."""
    driver.get_log("browser")  # of the page before
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())
    return [*driver.execute_script(LOOK), *(entry["message"] for entry in driver.get_log("browser"))]


def test_numbers_on_the_page_are_those_of_the_files(drawn):
    text = drawn.read_text(encoding="utf-8")
    scores, answers = tables_of(text)
    assert scores[1:] == [
        ["step 0", "80.00", "30.00", "40.00", "10.00", "10", "1"],
        ["step 12", "90.00", "50.00", "80.00", "60.00", "10", "1"],
    ]
    # Rewards 2 + step / 8: the first tenth of 12 steps, and the last.
    assert "12 of 12 grpo steps, finished. Mean reward in the first and in the last tenth" in text
    assert "tenth of the steps: 2.12 → 3.50." in text
    assert answers[0][:5] == ["id", "sentence", "reward BEFORE", "tIoU BEFORE", "vIoU BEFORE"]
    assert len(answers) == 11 and answers[1][:2] == ["1.y4m", HOSTILE] and answers[1][5:] == ["0.00"] * 3
    # Video 9 is off by d = 0.03 of the width, and before by 0.045: its IoU is (0.25 - d) / (0.25 + d).
    assert answers[-1][5:] == [f"{3 + 2 * (22 / 28 - 0.06):.2f}", "1.00", f"{22 / 28:.2f}"]
    assert answers[-1][4] == f"{(250 - 45) / (250 + 45):.2f}"
    assert "2 of the 11 clips shown cannot be read" in text and "0.y4m: no such video" in text


def test_sampled_answers_are_those_of_the_watched_prompts(tmp_path):
    run = make_run(tmp_path, videos=4)
    lines = read_jsonl(run / "watched.jsonl")
    lines += [line | {"step": step} for line in lines[:4] for step in (15, 18, 24)]  # of a run that went on
    write_jsonl(lines, run / "watched.jsonl")
    with (run / "watched.jsonl").open("a") as file:  # and was killed
        file.write('{"step": 12, "id": "4')
    prompts = page.read_prompts(run / "watched.jsonl", load_config(run / "config.yaml"))
    assert [(card.id, list(groups)) for card, groups in prompts] == [
        ("0.y4m", [0, 6, 12, 15, 24]),  # of eight steps five are shown
        ("1.y4m", [0, 3, 6, 9, 12]),
        ("2.y4m", [0, 3, 6, 9, 12]),
    ]
    # Off by d = 0, 0.1, 0.2: thinking boxes earn 1, final ones (0.25 - d) / (0.25 + d) - 2 d.
    expected = [5.0, 4 + 0.15 / 0.35 - 0.2, 4 + 0.05 / 0.45 - 0.4, 0.0]
    assert [answer.scores["reward"] for answer in prompts[1][1][3]] == pytest.approx(expected)
    text = draw_run(run)[0].read_text(encoding="utf-8")
    said = re.findall(r"<b>(.*)</b>: mean reward (.*); .* of (.) answers", text)
    assert said[5:7] == [
        (when, f"{sum(expected) / 4:.2f}", "4") for when in ("Before training", "After step 3")
    ]


def test_hostile_text_is_only_text_and_the_page_needs_nothing_else(drawn):
    text = drawn.read_text(encoding="utf-8")
    assert "<script" not in text and "<img src" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3  # sentence, note and answer
    assert not re.search(r"https?:|@import|\son\w+=", re.sub(r"base64,[^\"')]*|&lt;img[^&]*", "", text))
    assert "{{ 1 }}" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(drawn, driver, width):
    assert look(driver, drawn, width) == []
    boxes = "return [...document.querySelectorAll('.frames')].map(f => f.querySelectorAll('i').length)"
    # Sampled: of 3 x 5 groups 3 answers show 2 + 2 + 2 boxes, one shows 2. Held out: 8 sentences, ...
    counts = driver.execute_script(boxes)
    assert sorted(counts[:60]) == [2] * 15 + [6] * 45 and len(counts) == 60 + 2 * 8
    # Two strips of 6 frames side by side use the width, alone one does: frames of 100 px, none above 200.
    widths = "return [...document.querySelectorAll('.frames')].map(f => f.clientWidth / 6)"
    assert all((95 if width > 600 else 55) < w <= 200 for w in driver.execute_script(widths))


def test_a_shadow_says_that_a_table_goes_on(drawn, driver):
    """At 390 px its right edge is darker than the paper, until it is scrolled to the end."""
    look(driver, drawn, 390)
    (table, *_) = driver.find_elements("css selector", ".scroll")
    edges = []
    for place in (0, 9999):
        driver.execute_script(f"arguments[0].scrollLeft = {place}", table)
        picture = imread(io.BytesIO(table.screenshot_as_png), "png")[:, :, :3].mean(axis=(0, 2))
        edges.append(picture[-3])
    assert edges[0] < 0.85 and edges[1] > 0.97


def test_answers_side_by_side_are_level_however_long_their_notes_are(drawn, driver):
    look(driver, drawn, 1280)
    tops, heights = [], []
    for part in ("figcaption", ".frames", "details"):
        found = driver.find_elements("css selector", f"figure {part}")[-16:]  # 8 sentences, before and after
        tops.append([element.rect["y"] for element in found])
        heights.append([element.rect["height"] for element in found])
    assert heights[0][::2] != heights[0][1::2]
    assert tops[1][::2] == tops[1][1::2] and tops[2][::2] == tops[2][1::2]


def test_the_page_of_the_bench(tmp_path, driver, capsys):
    """The watched answers, under other weights: temporal counts twice, so that the best has 6."""
    run, file = make_run(tmp_path, videos=4), tmp_path / "bench.html"
    lines = read_jsonl(run / "watched.jsonl")
    for line in lines[4:8]:  # a group without a spread
        line["completion"] = "no idea"
    write_jsonl(lines, run / "watched.jsonl")
    (tmp_path / "videos" / "2.y4m").unlink()
    arguments = [str(run / "watched.jsonl"), "--html", str(file)]
    bench.main([*arguments, "--config", str(run / "config.yaml"), "rewards.temporal=2"])
    assert capsys.readouterr().out.endswith(f"{bench.HINT}\npage: {file}\n")
    assert look(driver, file, 1280) == look(driver, file, 390) == []
    text = file.read_text(encoding="utf-8")
    assert "<p>Columns: the mean, " in text and "has the largest share.</p>" in text and "--help" not in text
    sentences = re.findall("<h3>(.*)</h3>", text)
    assert len(sentences) == bench.GROUPS and set(sentences) <= {
        f"the $quare moves_left ({k}.y4m)" for k in range(3)
    }
    rewards = re.findall(r"<b>(BEST|WORST)</b> reward (.*), vIoU (.*) <em>(.*)</em>", text)
    assert rewards[::2] == [("BEST", "6.00", "1.00", "")] * bench.GROUPS
    assert {found[:3] for found in rewards[1::2]} == {("WORST", "0.00", "0.00")}
    assert rewards[1][3].startswith("malformed: no idea (at ")
    assert "total " in text and "cannot be read, and their frames are grey; the first: " in text
    assert text.count("--steps: 6;") == bench.GROUPS  # the clips' own; below: one step beyond the true span
    bench.main(arguments)
    text = file.read_text(encoding="utf-8")
    assert text.count("--steps: 5;") == text.count("sentence not known (") == bench.GROUPS
    assert "<b>BEST</b> reward 5.00, vIoU 1.00" in text


def test_the_browser_finds_what_is_wrong(driver, tmp_path):
    (tmp_path / "page.html").write_text('<div style="width:2000px">.</div><img src=x:y>')
    complaints = look(driver, tmp_path / "page.html", 390)
    assert all(any(word in line for line in complaints) for word in ("sideways", "nothing to see", "x:y"))
