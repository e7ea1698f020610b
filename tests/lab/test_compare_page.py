"""The page of lab/compare.py: what it says, and how a browser shows it."""

import html
import re
import shutil

import pytest

pytest.importorskip("matplotlib")

from run_folder import OWN, make_run
from test_page import driver, look  # noqa: F401 (a fixture)

from config import load_config, save_config
from lab import compare
from runtime.files import read_jsonl, write_jsonl

HOSTILE = "<script>alert(1)</script>.py:x"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder with the page of a run and of two seeds with another reward, of a hostile name."""
    folder = tmp_path_factory.mktemp("compared")
    run = make_run(folder)
    (run / "summary.json").write_text('{"after": {}}')
    runs = [run, *(shutil.copytree(run, folder / f"$new<b>$_seed{k}") for k in (1, 2))]
    for k, other in enumerate(runs):
        config = load_config(other / "config.yaml", [f"seed={k}"])
        config.rewards |= {HOSTILE: 1.0, OWN: 1.0} if k else {}
        save_config(config, other / "config.yaml")
        lines = [line for line in read_jsonl(other / "metrics.jsonl") if line["phase"] == "grpo"]
        lines = [{key: line[key] for key in ("phase", "step", "reward", "kl", OWN)} for line in lines]
        write_jsonl([line | ({HOSTILE: k} if k else {}) for line in lines], other / "metrics.jsonl")
    compare.main([*map(str, runs), "--output", str(folder / "out")])
    return folder / "out"


def test_the_page_holds_the_tables_and_a_picture_of_each_curve(compared):
    text = (compared / "index.html").read_text(encoding="utf-8")
    cells = [html.unescape(cell) for cell in re.findall("<t[hd].*?>(.*?)</t[hd]>", text)]
    assert f"rewards.{HOSTILE}" in cells and any("$new<b>$ (2 seeds)" in cell for cell in cells)
    row = cells[cells.index("m_vIoU") :]
    assert re.fullmatch(r"\S+ \[\S+, \S+\]", row[1]) and row[2] == "no difference shown" and "->" in row[3]
    assert "<script" not in text and "<b>" not in text
    names = [html.unescape(name) for name in re.findall('<img alt="(.*?)" src="data:image/svg', text)]
    assert names == ["reward (other weights: not comparable)", "kl", HOSTILE, OWN]
    assert (compared / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(compared, driver, width):  # noqa: F811
    assert look(driver, compared / "index.html", width) == []
