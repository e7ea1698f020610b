"""The bench: lines in, lines with rewards out, faults named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_rewards import RIGHT, TABLE, TRUTH, text

import bench
import rewards
from rewards import TERMS, score

ROOT = Path(__file__).resolve().parent.parent


def run_bench(path):
    command = [sys.executable, str(ROOT / "rewards.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def line(completion, **more):
    boxes = {str(step): list(box) for step, box in TRUTH.boxes.items()}
    return {"completion": completion, "truth": {"span": [4, 7], "boxes": boxes}} | more


def test_bench_adds_the_rewards_to_every_line(tmp_path):
    completions = [entry[0] for entry in TABLE.values()]
    records = [line(c, id=f"clip {k}", extra={"ü": [1, None, 0.1]}) for k, c in enumerate(completions)]
    without = "<time> 4 - 4 </time> <pred_bbox> 4. [200, 200, 400, 600] </pred_bbox>"
    records += [line(without, think=False), line(text(4, 7, RIGHT).replace("200", "400"), scale=[2000, 1000])]
    records += [line("\ud800 \u2028 lone surrogate", rewards="replaced")]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    run = run_bench(path)
    assert run.returncode == 0
    output = [json.loads(text) for text in run.stdout.splitlines()]
    assert len(output) == len(records)
    for record, result in zip(records, output, strict=True):
        added = result.pop("rewards")
        assert result == {key: value for key, value in record.items() if key != "rewards"}
        assert list(added) == [*TERMS, "total"]
        expected = score(
            record["completion"],
            TRUTH,
            tuple(record.get("scale", (1000, 1000))),
            think=record.get("think", True),
        )
        assert added == expected.rewards
    parsed = sum(
        score(record["completion"], TRUTH, think=record.get("think", True)).answer is not None
        for record in records
    )
    assert f"{len(records)} answers, {parsed} of them parse" in run.stderr
    assert all(term in run.stderr for term in (*TERMS, "total"))


def test_bench_reads_an_empty_file_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert (run_bench(path).returncode, run_bench(path).stdout) == (0, "")
    path.write_text(json.dumps(line(text(4, 7, RIGHT))))
    assert json.loads(run_bench(path).stdout)["rewards"]["total"] == 5.0


def faulty(**truth):
    return json.dumps({"completion": "", "truth": {"span": [4, 7], "boxes": {}} | truth})


FAULTS = {
    "cut off": ('{"completion": "a", "tru', "not valid JSON"),
    "prose": ("hello", "not valid JSON"),
    "blank": ("", "not valid JSON"),
    "two objects": ("{} {}", "not valid JSON"),
    "NaN": ('{"completion": NaN}', "not valid JSON.*NaN"),
    "not UTF-8": (b'{"completion": "\xff\xfe"}', "not valid JSON"),
    "too deep": ("[" * 100000, "recursion"),
    "too large to write": (faulty()[:-1] + ', "x": 1e999}', "JSON"),
    "a list": ("[1, 2]", "not a JSON object"),
    "no completion": ('{"truth": {}}', '"completion" is missing'),
    "no truth": ('{"completion": ""}', '"truth" is missing'),
    "completion": (json.dumps(line(["a"])), '"completion" is'),
    "think": (json.dumps(line("", think="no")), "\"think\" is 'no': write true or false"),
    "scale": (json.dumps(line("", scale=[0, 1000])), '"scale"'),
    "truth": ('{"completion": "", "truth": [4, 7]}', '"truth": write'),
    "span backwards": (faulty(span=[7, 4]), r"truth span \[7, 4\]"),
    "span of floats": (faulty(span=[4.0, 7.0]), "truth span"),
    "span of one": (faulty(span=[4]), "truth span"),
    "boxes": (faulty(boxes=[[0, 0, 1, 1]]), "truth boxes"),
    "step": (faulty(boxes={"five": [0, 0, 1, 1]}), "truth box 'five'"),
    "pixels": (faulty(boxes={"5": [10, 20, 300, 400]}), "truth box '5'.*from 0 to 1"),
    "flipped": (faulty(boxes={"5": [0.5, 0, 0.1, 1]}), "truth box '5'.*x1 <= x2"),
    "three numbers": (faulty(boxes={"5": [0, 0, 1]}), "truth box '5'"),
    "a word": (faulty(boxes={"5": [0, 0, 1, "1"]}), "truth box '5'"),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS.keys())
def test_bench_names_file_and_line(fault, message, tmp_path, capsys):
    """Without a process of its own for every fault; the next test has one."""
    path = tmp_path / "answers.jsonl"
    good = json.dumps(line("")).encode()
    path.write_bytes(good + b"\n" + (fault if isinstance(fault, bytes) else fault.encode()) + b"\n" + good)
    with pytest.raises(ValueError, match=rf"answers\.jsonl, line 2: .*{message}") as error:
        bench.main([str(path)])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""  # nothing half-written


def test_bench_fails_with_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line("")) + "\n{\n")
    for run, message in (
        (run_bench(path), f"error: {path}, line 2: not valid JSON"),
        (run_bench("absent.jsonl"), "error: absent.jsonl: No such file or directory; check the path"),
        (run_bench(tmp_path), f"error: {tmp_path}: Is a directory; check the path"),
    ):
        assert (run.returncode, run.stdout) == (1, "")
        assert message in run.stderr and run.stderr.count("\n") == 1
    usage = subprocess.run([sys.executable, str(ROOT / "rewards.py")], capture_output=True, text=True)
    assert usage.returncode == 1 and usage.stderr.startswith("usage: python rewards.py FILE.jsonl")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_bench_explains_itself(word):
    run = run_bench(word)
    assert (run.returncode, run.stdout, run.stderr) == (0, rewards.__doc__.strip() + "\n", "")
