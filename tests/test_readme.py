"""README: its "another reward", followed to the letter on a small world, and its links."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from tiny_runs import metrics_of, no_pictures

import train
from prompts import Answer

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REWARD = "my_rewards.py:smoothness"


def block(pattern):
    """The first block of code that matches."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.S | re.M)
    return next(code for code in blocks if re.search(pattern, code, re.M))


EXPLOITS = re.search(r"`one easy step` is paid ([\d.]+),\s+honest play ([\d.]+)\.\)", TEXT).groups()
PYTHON, YAML, SHELL = map(block, (r"^def smoothness", r"^rewards:", r"^python .*my_rewards\.yaml"))


def test_another_reward(tmp_path, monkeypatch, grpo_config, capsys):
    """From the text to a trained model and its page. The toy's configuration is the small world's, and
    nothing else is changed."""
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(PYTHON)
    Path("my_rewards.yaml").write_text(YAML)
    Path("configs").mkdir()
    toy = grpo_config(tmp_path, steps=1, eval_every=0, eval_limit=2, output_dir="runs/toy")
    Path(toy).rename("configs/toy.yaml")
    said = {}
    for command in ["python train.py configs/toy.yaml", *SHELL.splitlines()]:
        program, *words = shlex.split(command, comments=True)[1:]
        if program == "-m":
            program, *words = words
            monkeypatch.setattr(sys, "argv", [program, *words])
            runpy.run_module(program, run_name="__main__")
        else:
            with no_pictures():
                train.main(words)
        said[program] = "".join(capsys.readouterr())
    assert list(said) == ["train.py", "lab.exploits", "lab.bench", "lab.pictures", "lab.compare"]
    paid = said["lab.exploits"].partition(f"{REWARD}, without its weight")[2]
    for play, pay in zip(("one easy step", "honest play"), EXPLOITS, strict=True):
        assert re.search(rf"^{play} +{pay} ", paid, re.M)
    assert REWARD in said["lab.bench"]
    run = Path("runs/toy_my_rewards")
    assert str(run) in said["lab.pictures"]
    assert f"| rewards.{REWARD} | -        | 0.2 " in said["lab.compare"]
    heads = re.search(r"^\| +\| runs/toy .*\| difference.*$", TEXT, re.M)[0]
    assert re.sub(" +", " ", heads) in re.sub(" +", " ", said["lab.compare"])
    assert REWARD in (run / "pictures/run.html").read_text(encoding="utf-8")
    (line,) = metrics_of(run, "grpo")
    assert 0 < line[REWARD] <= 1 and REWARD in line["std"]


def test_smoothness_by_hand():
    """Sides at 0, .1, .3, .6: second differences .1 and .1 for one side of four, 0 for the others."""
    module = {}
    exec(PYTHON, module)
    boxes = tuple((step, (0.0, 0.0, x, 1.0)) for step, x in enumerate((0.3, 0.4, 0.6, 0.9)))
    assert module["smoothness"](Answer(0, 3, None, boxes), None) == pytest.approx(1 - 0.2 / 8)
    assert module["smoothness"](Answer(0, 1, None, boxes[:2]), None) == 1


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert links
