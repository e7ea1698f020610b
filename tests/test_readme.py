"""README, "Another reward", followed to the letter: its files, its commands, on a small world."""

import json
import re
import shlex
from pathlib import Path

import pytest

import train
from lab import bench

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language, after):
    """The first block of code of that language after the words."""
    return re.search(rf"```{language}\n(.*?)```", TEXT[TEXT.index(after) :], re.S)[1]


def test_another_reward(tmp_path, monkeypatch, write_config, capsys):
    """From the text to a trained model and its page. The toy's configuration is the small world's, and
    nothing else is changed."""
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(block("python", "### Another reward"))
    Path("my_rewards.yaml").write_text(block("yaml", "### Another reward"))
    Path("configs").mkdir()
    toy = {"model": str(ROOT / "checkpoints/toy"), "max_new_tokens": 192, "steps": 1, "eval_limit": 2}
    Path(write_config(tmp_path, **toy, output_dir="runs/toy")).rename("configs/toy.yaml")
    train.main(["configs/toy.yaml"])

    commands = [shlex.split(line) for line in block("sh", "### Another reward").splitlines()]
    assert [words[:2] for words in commands] == [
        ["python", "rewards.py"],
        ["python", "rewards.py"],
        ["python", "train.py"],
        ["python", "visualize.py"],
    ]
    exploits, bench_, training, pictures = (words[2:] for words in commands)
    bench.main(exploits)
    assert "one easy step" in capsys.readouterr().out
    bench.main(bench_)
    assert "my_rewards.py:smoothness" in capsys.readouterr().err
    assert "my_rewards.py:smoothness" in Path("bench.html").read_text(encoding="utf-8")
    train.main(training)
    pictures.main(pictures)
    run = Path("runs/toy_my_rewards")
    assert str(run / "pictures/run.html") in capsys.readouterr().out
    assert "my_rewards.py:smoothness" in (run / "pictures/run.html").read_text(encoding="utf-8")
    (line,) = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["phase"] == "grpo"]
    assert 0 < line["my_rewards.py:smoothness"] <= 1 and "my_rewards.py:smoothness" in line["std"]


def test_smoothness_by_hand():
    """Sides at 0, .1, .3, .6: second differences .1 and .1 for one side of four, 0 for the others."""
    from prompts import Answer

    spoken = {}
    exec(block("python", "### Another reward"), spoken)
    boxes = tuple((step, (0.0, 0.0, x, 1.0)) for step, x in enumerate((0.3, 0.4, 0.6, 0.9)))
    assert spoken["smoothness"](Answer(0, 3, None, boxes), None) == pytest.approx(1 - 0.2 / 8)
    assert spoken["smoothness"](Answer(0, 1, None, boxes[:2]), None) == 1


def test_every_file_of_the_map_is_there_and_every_module_is_in_it():
    table = TEXT[TEXT.index("## The files, in reading order") : TEXT.index("### Another reward")]
    named = set(re.findall(r"\]\(([\w./]+)\)", table))
    assert all((ROOT / name).exists() for name in named)
    assert {path.name for path in ROOT.glob("*.py")} - named == set()


def test_no_figure_is_still_to_come():
    assert not re.findall(r"[A-Z]{3,}_[A-Z]{3,}", re.sub(r"`[^`]*`|\S*=\S*", "", TEXT))


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert len(links) > 30 and all((ROOT / link).exists() for link in links)
