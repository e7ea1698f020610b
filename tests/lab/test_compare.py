"""The rows of the paper's Tables 5-8 as configurations, and the tables from finished runs."""

import dataclasses
import json
from pathlib import Path

import pytest

import evaluate
from config import load_config, save_config
from lab import compare
from runtime.files import DataError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
TRAINED = ("hcstvg_v1", "hcstvg_v1_lora", "hcstvg_v2", "vidstg", "qwen3_vl", "toy")

# Typed from the paper: m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5 on HC-STVG v1; of Table 8 only m_vIoU.
FIGURES = {
    5: {
        "base model, untrained": "25.6 19.1 20.2 12.6",
        "supervised fine-tuning": "53.5 28.6 45.2 21.9",
        "RFT, no thinking boxes": "58.5 41.8 68.7 38.9",
        "RFT + thinking boxes": "60.3 44.1 73.3 43.5",
    },
    6: {
        "without the think reward": "59.3 42.2 69.1 39.9",
        "with the think reward": "60.3 44.1 73.3 43.5",
    },
    7: {
        "GIoU only": "58.6 40.6 67.6 36.6",
        "L1 only": "58.5 39.9 67.0 34.6",
        "GIoU + L1": "60.3 44.1 73.3 43.5",
    },
    8: {"λ = 0.2": "42.5", "λ = 0.5": "44.1", "λ = 1.0": "43.8"},
}

# What each file changes, and nothing else.
CHANGES = {
    "base": {"steps": 0},
    "sft": {"steps": 0, "sft.steps": 350},
    "rft": {"think": False},
    "rft_think": {},
    "no_think_reward": {"rewards.think": 0.0},
    "giou_only": {"rewards.l1": 0.0},
    "l1_only": {"rewards.giou": 0.0},
    "lambda_0.2": {"rewards.think": 0.2},
    "lambda_1.0": {"rewards.think": 1.0},
}


def flat(config):
    """Settings by dotted names."""
    settings = {}
    for key, value in dataclasses.asdict(config).items():
        settings |= {f"{key}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {}
        settings |= {} if isinstance(value, dict) else {key: value}
    return settings


def test_there_is_a_file_for_each_row_and_no_other():
    assert {path.stem for path in (CONFIGS / "ablations").iterdir()} == set(CHANGES) == set(compare.PAPER)
    assert {row for table in compare.TABLES for row in table.rows} == set(CHANGES)


@pytest.mark.parametrize("data", TRAINED)
@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_what_it_says_over_any_data(data, row):
    base = load_config(CONFIGS / f"{data}.yaml")
    config = load_config([CONFIGS / f"{data}.yaml", CONFIGS / f"ablations/{row}.yaml"])
    before, after = flat(base), flat(config)
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == CHANGES[row] | {"output_dir": f"runs/{data}_{row}"}


@pytest.mark.parametrize("row", CHANGES)
def test_a_row_file_says_the_papers_figures(row):
    """In its first comment, with the number of the table: they are those that are printed."""
    comment = (CONFIGS / f"ablations/{row}.yaml").read_text().partition("\n\n")[0]
    assert comment.startswith("# Table ")
    number = int(comment[len("# Table ")])
    names = dict(zip(compare.TABLES[number - 5].rows, FIGURES[number].values(), strict=True))
    *most, last = names[row].split()
    assert " / ".join([*most, last]) in comment or f"m_vIoU {last}" in comment


# ----------------------------------------------------------------------------------------------------------
# From folders to tables


@pytest.fixture
def made_up(tmp_path):
    """made_up(name, scores, settings...) -> the folder of a run that might have been."""

    def make(name, scores, *settings, data="hcstvg_v1"):
        folder = tmp_path / name
        folder.mkdir()
        save_config(load_config(CONFIGS / f"{data}.yaml", settings), folder / "config.yaml")
        after = dict(zip(("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5"), scores, strict=True))
        before = dict.fromkeys(after, 99.9)
        (folder / "summary.json").write_text(json.dumps({"before": before, "after": after | {"N": 9}}))
        return folder

    return make


def parsed(text):
    """{number of the table: {name of the row: cells}} of what is printed."""
    found, number = {}, None
    for line in text.splitlines():
        if line.startswith("Table "):
            number = int(line[len("Table ")])
            found[number] = {}
        elif line.startswith("| ") and not line.startswith("| -"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[number][name] = cells
    return found


def test_figures_of_the_paper_stand_beside(made_up):
    """In every second column; where nothing has been run, the others say so."""
    found = parsed(compare.format_tables(compare.read_runs([made_up("a", (1, 2, 3, 4))])))
    assert found.keys() == FIGURES.keys()
    for number, rows in FIGURES.items():
        head, *names = found[number]
        columns = ["m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5"] if number < 8 else ["m_vIoU"]
        assert (head, found[number][head][0]) == ("", "runs")
        assert found[number][head][1::2] == columns and set(found[number][head][2::2]) == {"paper"}
        assert names == list(rows)
        for name, figures in rows.items():
            assert found[number][name][2::2] == figures.split()
            if name in ("RFT + thinking boxes", "with the think reward", "GIoU + L1"):
                assert found[number][name][1::2] == ["1.0", "2.0", "3.0", "4.0"]
            elif name == "λ = 0.5":
                assert found[number][name][:2] == ["1", "2.0"]
            else:
                assert found[number][name][0] == "0" and set(found[number][name][1::2]) == {"not run"}


def test_mean_and_spread_of_seeds(made_up, capsys):
    """10, 12 and 17: 13, and the square root of (9 + 1 + 16) / 2. Names of folders say nothing."""
    scores = [(10, 0, 50, 20), (12, 0, 50, 21), (17, 0, 50, 22)]
    paths = [made_up(f"base_{n}", s, "rewards.l1=0", f"seed={n}") for n, s in enumerate(scores)]
    compare.main([*paths, made_up("giou_only_seed0", (1, 2.25, 3, 4), "steps=0")])
    found = parsed(capsys.readouterr().out)
    assert found[7]["GIoU only"][::2] == ["3", "58.6", "40.6", "67.6", "36.6"]
    assert found[7]["GIoU only"][1::2] == ["13.0 ± 3.6", "0.0 ± 0.0", "50.0 ± 0.0", "21.0 ± 1.0"]
    assert found[5]["base model, untrained"][:4] == ["1", "1.0", "25.6", "2.2"]
    assert found[7]["L1 only"][1] == found[5]["RFT + thinking boxes"][1] == "not run"


@pytest.mark.parametrize("row", CHANGES)
def test_every_row_is_recognised(made_up, row):
    folder = made_up("a", (5, 6, 7, 8))
    files = [CONFIGS / "hcstvg_v1.yaml", CONFIGS / f"ablations/{row}.yaml"]
    save_config(load_config(files, ["seed=9", "micro_batch=2"]), folder / "config.yaml")
    assert [run.row for run in compare.read_runs([folder])] == [row]


def test_settings_of_no_row(made_up, tmp_path):
    """They are named below; a reward that is only watched makes no difference."""
    (tmp_path / "own.py").write_text("def one(answer, truth):\n    return 1.0\n")
    own = f"{tmp_path}/own.py:one"
    others = [
        made_up("both", (1, 2, 3, 4), "sft.steps=5"),
        made_up("neither", (1, 2, 3, 4), "think=false", "rewards.l1=0"),
        made_up("untrained", (1, 2, 3, 4), "think=false", "steps=0"),
        made_up("weight", (1, 2, 3, 4), "rewards.think=0.3"),
        made_up("guard", (1, 2, 3, 4), "rewards.empty_overlap=-1"),
        made_up("paid", (1, 2, 3, 4), f"rewards={{{own}: 1}}"),
    ]
    watched = made_up("watched", (1, 2, 3, 4), f"rewards={{{own}: 0}}")
    unlearned = made_up("unlearned", (1, 2, 3, 4), "steps=0", "rewards.l1=0")  # no reward was used
    runs = compare.read_runs([*others, watched, unlearned])
    assert [run.row for run in runs] == [""] * len(others) + ["rft_think", "base"]
    *_, last = compare.format_tables(runs).splitlines()
    assert last.endswith(": " + ", ".join(map(str, others))) and "no row" in last


def test_each_data_set_has_tables_of_its_own(made_up):
    paths = [made_up("one", (1, 1, 1, 1)), made_up("two", (3, 3, 3, 3), data="hcstvg_v2")]
    first, second = compare.format_tables(compare.read_runs(paths)).split("After training, on ")[1:]
    assert first.startswith("data/hcstvg_v1/test.json") and second.startswith("data/hcstvg_v2/val_v2.json")
    assert parsed(first)[8]["λ = 0.5"][1] == "1.0" and parsed(second)[8]["λ = 0.5"][1] == "3.0"


SAME = {  # settings of two runs that may stand in one table, and the rows where they stand
    "seeds": ([], ["seed=5"], {"RFT + thinking boxes": "2"}),
    "how it runs": ([], ["micro_batch=4", "eval_batch=2"], {"RFT + thinking boxes": "2"}),
    "rows": (["rewards.l1=0"], ["rewards.giou=0"], {"GIoU only": "1", "L1 only": "1"}),
    "no steps": (["steps=0", "sft.steps=7"], ["steps=0"], {"supervised fine-tuning": "1"}),
    "another model that does not think": (["think=false", "model=a"], [], {"RFT, no thinking boxes": "1"}),
}
WATCHED = f"rewards.{CONFIGS.parent}/examples/viou.py:viou"
UNLIKE = {
    "another model": ([], ["model=other"], "model is other, in "),
    "another model in another row": (["rewards.l1=0"], ["model=other"], "model is other, in "),
    "another model, untrained": (["steps=0"], ["model=other"], "model is other, in "),
    "other sentences": ([], ["seed=1", "train_annotations=half.json"], "train_annotations is half.json, in "),
    "other sentences, untrained": (["steps=0"], ["train_annotations=a"], "train_annotations is a, in "),
    "fewer steps": ([], ["steps=9"], "steps is 9, in "),
    "fewer steps in another row": (["rewards.l1=0"], ["steps=9"], "steps is 9, in "),
    "fewer supervised": (["steps=0", "sft.steps=7"], ["steps=0", "sft.steps=8"], "sft.steps is 8, in "),
    "a larger step": (["rewards.l1=0"], ["learning_rate=1"], "learning_rate is 1.0, in "),
    "part of the sentences": (["steps=0"], ["eval_limit=5"], "eval_limit is 5, in "),
    "a reward that one watches": ([f"{WATCHED}=0"], [], f"{WATCHED} is None, in "),
}


@pytest.mark.parametrize("case", SAME)
def test_runs_that_can_be_compared(made_up, case):
    *settings, rows = SAME[case]
    paths = [made_up(str(n), (1, 2, 3, 4), *words) for n, words in enumerate(settings)]
    found = parsed(compare.format_tables(compare.read_runs(paths)))
    counts = {name: cells[0] for table in found.values() for name, cells in table.items()}
    assert counts.items() >= rows.items()


@pytest.mark.parametrize("case", UNLIKE)
def test_runs_that_cannot_be_compared(made_up, case):
    *settings, said = UNLIKE[case]
    one, two = (made_up(name, (1, 2, 3, 4), *s) for name, s in zip(("one", "two"), settings, strict=True))
    with pytest.raises(DataError) as caught:
        compare.format_tables(compare.read_runs([one, two]))
    message = str(caught.value)
    assert message.startswith(f"{two}: {said}{one} it is ") and "leave out one" in message
    assert "\n" not in message


def test_each_run_is_compared_with_every_other(made_up):
    """The first one may have another model than either, but these two may not differ from one another."""
    direct = made_up("direct", (1, 2, 3, 4), "think=false", "model=a")
    small = made_up("small", (1, 2, 3, 4), "rewards.l1=0", "model=b")
    large = made_up("large", (1, 2, 3, 4), "model=c")
    compare.main([direct, small])
    compare.main([direct, large])
    with pytest.raises(DataError, match=f"^{large}: model is c, in {small} it is b; leave out one"):
        compare.main([direct, small, large])


def test_what_is_no_finished_run(made_up, tmp_path):
    fine, unfinished = made_up("fine", (1, 2, 3, 4)), made_up("unfinished", (1, 2, 3, 4))
    (unfinished / "summary.json").unlink()
    for path, missing in ((unfinished, "summary.json"), (tmp_path / "nowhere", "config.yaml")):
        with pytest.raises(DataError, match=rf"^{path}: is no finished run .*no {missing}\); wait for"):
            compare.main([fine, path])
    for content in ("[]", "{}", '{"after": null}', '{"after": {"m_tIoU": 1}}', "{"):
        (fine / "summary.json").write_text(content)
        with pytest.raises(DataError, match=rf"^{fine}/summary.json: ") as caught:
            compare.read_runs([fine])
        assert "\n" not in str(caught.value)


def test_evaluate_prints_them(made_up, capsys):
    folder = made_up("a", (1, 2, 3, 4))
    evaluate.main(["--table", str(folder)])
    printed = capsys.readouterr().out
    compare.main([folder])
    assert printed == capsys.readouterr().out and "Table 8" in printed
