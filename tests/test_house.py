"""The house: few files at the root, no circle of imports, a README whose links hit their lines."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("qwen", "video", "runtime", "lab", "toy")
CARD = {"train", "evaluate", "grpo", "rewards", "data", "prompts"}  # what the user asked for at the root
BESIDE = {"model", "metrics", "config", "samples", "answer"}
BELOW = {
    "samples",
    "config",
    "prompts",
    "rewards",
    "runtime",
    "video",
}  # what qwen, video and runtime may import


def modules():
    """name -> names of the project's modules that it imports, also inside functions."""
    paths = {path.stem: path for path in ROOT.glob("*.py")}
    paths |= {f"{room}.{path.stem}": path for room in ROOMS for path in (ROOT / room).glob("*.py")}
    graph = {}
    for name, path in paths.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = found & paths.keys()
    return graph


def test_no_circle_of_imports():
    TopologicalSorter(modules()).prepare()  # raises CycleError, which names the circle


def test_the_root_holds_what_the_design_says():
    assert {path.stem for path in ROOT.glob("*.py")} == CARD | BESIDE


def test_arrows_go_one_way():
    for name, imported in modules().items():
        rooms = {other.split(".")[0] for other in imported} - {name.split(".")[0]}
        if name.split(".")[0] in ("qwen", "video", "runtime"):
            assert rooms <= BELOW, name
        if name not in ("train", "answer") and not name.startswith("lab."):
            assert "lab" not in rooms, name


def test_the_sitting_stays_short():
    lines = [
        len((ROOT / f"{name}.py").read_text().splitlines())
        for name in ("prompts", "rewards", "grpo", "train")
    ]
    assert sum(lines) <= 1000


def test_links_to_lines_hit_what_they_name():
    """[`name`](file.py#L10) and [`name`](file.py#L10-L20) begin at the line that defines the name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)(?:-L\d+)?\)", (ROOT / "README.md").read_text())
    assert links
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), f"{name}: {file}:{line} is {text!r}"
