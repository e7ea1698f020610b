"""The rows of the paper's Tables 5-8 as configurations, and the tables from finished runs."""

import json

import pytest

from config import load_config, save_config
from lab import tables
from lab.tables import PAPER, ROWS, TABLES
from runtime.files import DataError

CONFIGS = ROWS.parent

# Typed from the paper: m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5 on HC-STVG v1.
FIGURES = {
    5: ["25.6 19.1 20.2 12.6", "53.5 28.6 45.2 21.9", "58.5 41.8 68.7 38.9", "60.3 44.1 73.3 43.5"],
    6: ["59.3 42.2 69.1 39.9", "60.3 44.1 73.3 43.5"],
    7: ["58.6 40.6 67.6 36.6", "58.5 39.9 67.0 34.6", "60.3 44.1 73.3 43.5"],
    8: ["59.5 42.5 70.9 40.6", "60.3 44.1 73.3 43.5", "60.5 43.8 72.4 42.9"],
}
CHANGES = {  # what each row's file changes, and nothing else
    "base": "steps=0",
    "sft": "steps=0 sft.steps=350",
    "rft": "think=false",
    "rft_think": "",
    "no_think_reward": "rewards.think=0",
    "giou_only": "rewards.l1=0",
    "l1_only": "rewards.giou=0",
    "lambda_0.2": "rewards.think=0.2",
    "lambda_1.0": "rewards.think=1",
}


@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_what_it_says_over_any_data(row):
    assert {path.stem for path in ROWS.iterdir()} == set(CHANGES) == set(PAPER)
    for data in ("hcstvg_v1", "hcstvg_v1_lora", "hcstvg_v2", "vidstg", "qwen3_vl", "toy"):
        config = load_config([CONFIGS / f"{data}.yaml", ROWS / f"{row}.yaml"])
        changes = [*CHANGES[row].split(), f"output_dir=runs/{data}_{row}"]
        assert config == load_config(CONFIGS / f"{data}.yaml", changes) and tables.row_of(config) == row


@pytest.fixture
def made_up(tmp_path):
    """made_up(name, scores, key=value, ...) -> a run that might have been."""

    def make(name, scores, *settings):
        folder = tmp_path / name
        folder.mkdir()
        save_config(load_config(CONFIGS / "hcstvg_v1.yaml", settings), folder / "config.yaml")
        after = dict(zip(tables.COLUMNS, scores, strict=True))
        (folder / "summary.json").write_text(json.dumps({"before": {}, "after": after}))
        return tables.read_run(folder)

    return make


def parsed(text):
    """The lines of each table that is printed, as cells; without heads."""
    parts = [part.splitlines()[2:] for part in text.split("\n\n") if part.startswith("| ")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in part] for part in parts]


def test_figures_of_the_paper_stand_beside(made_up):
    """In every second column; the others say what has not been run."""
    found = parsed(tables.format_tables([made_up("a", (1, 2, 3, 4))]))
    for (number, figures), (title, rows), table in zip(FIGURES.items(), TABLES.items(), found, strict=True):
        assert str(number) in title and [" ".join(cells[3::2]) for cells in table] == figures
        for (row, name), cells in zip(rows.items(), table, strict=True):
            ours = ["1", "1.0", "2.0", "3.0", "4.0"] if row == "rft_think" else ["0"] + 4 * ["not run"]
            assert [*cells[:2], *cells[2::2]] == [name, *ours]


def test_mean_and_spread_of_seeds(made_up):
    """10, 12 and 17: 13, and the square root of (9 + 1 + 16) / 2. Names of folders say nothing."""
    scores = [(10, 0, 50, 20), (12, 0, 50, 21), (17, 0, 50, 22)]
    runs = [made_up(f"base_{n}", s, "rewards.l1=0", f"seed={n}") for n, s in enumerate(scores)]
    giou_only = parsed(tables.format_tables(runs))[2][0]
    assert giou_only[:2] == ["GIoU only", "3"]
    assert giou_only[2::2] == ["13.0 ± 3.6", "0.0 ± 0.0", "50.0 ± 0.0", "21.0 ± 1.0"]


def test_runs_of_no_row(made_up, tmp_path):
    """A plug-in that is only watched makes no difference, nor do rewards where there are no steps."""
    plugin = f"{tmp_path}/own.py:one"
    settings = ("sft.steps=5", "think=false rewards.l1=0", "rewards.think=0.3", f"rewards.{plugin}=1")
    others = [made_up(f"run{n}", (1, 2, 3, n), *words.split()) for n, words in enumerate(settings)]
    assert [run.row for run in others] == [""] * 4
    assert made_up("watched", (1, 2, 3, 4), f"rewards.{plugin}=0").row == "rft_think"
    assert made_up("unlearned", (1, 2, 3, 4), "steps=0", "rewards.l1=0").row == "base"


def test_tables_below_a_comparison(made_up):
    """Only where there are two rows to compare; a run of no row is left out of them."""
    whole, again = (made_up(name, (1, 2, 3, 4), f"seed={name[-1]}") for name in ("whole0", "whole1"))
    other, none = made_up("l1", (1, 2, 3, 4), "rewards.giou=0"), made_up("none", (0,) * 4, "sft.steps=5")
    assert tables.tables_of_rows([whole, again, none]) == ""
    assert tables.tables_of_rows([whole, other, none]) == tables.format_tables([whole, other])
    faster = made_up("faster", (1, 2, 3, 4), "rewards.giou=0", "learning_rate=1")
    assert tables.tables_of_rows([whole, faster]).startswith("Tables 5-8 of the paper are left out: ")


COMPARABLE = {  # settings of two runs that may stand in one table
    "seeds, and how it runs": ("", "seed=5 micro_batch=4 eval_batch=2"),
    "no reinforcement": ("steps=0 sft.steps=7", ""),
    "another model that does not think": ("think=false model=a", ""),
}
UNLIKE = {  # settings of two runs that may not -> the one that is blamed
    "model": ("rewards.l1=0", "model=b"),
    "steps": ("rewards.l1=0", "steps=9"),
    "sft": ("steps=0 sft.steps=7", "steps=0 sft.steps=8"),
    "learning_rate": ("rewards.l1=0", "learning_rate=1"),
}


@pytest.mark.parametrize("name, settings", (COMPARABLE | UNLIKE).items())
def test_runs_that_can_and_cannot_be_compared(made_up, name, settings):
    one, two = (made_up(n, (1, 2, 3, 4), *words.split()) for n, words in zip("ab", settings, strict=True))
    if name in COMPARABLE:
        assert len(parsed(tables.format_tables([one, two]))) == 4
    else:
        with pytest.raises(DataError, match=f"^{two.folder}: {name} is .*{one.folder} .*leave"):
            tables.format_tables([one, two])
