"""lab/compare.py: its tables and intervals by hand, how often it is wrong, what it refuses."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
from run_folder import answer_text, make_run, record_of

from config import load_config, save_config
from lab import compare
from runtime.files import DataError, read_jsonl, write_jsonl

COUNT = 24  # held-out sentences
OWN = "my/own.py:mine_"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run whose answers before training are off by 0.2, and the first malformed. It needs no videos."""
    folder = tmp_path_factory.mktemp("world")
    run = make_run(folder, videos=1)
    (event,) = json.loads((folder / "all.json").read_text()).values()
    (folder / "all.json").write_text(json.dumps({f"{k}.y4m": event for k in range(COUNT)}))
    texts = ["<time> 2", *[answer_text(200, 200)] * (COUNT - 1)]
    write_jsonl([record_of(t, f"{k}.y4m") for k, t in enumerate(texts)], run / "predictions_before.jsonl")
    return run


@pytest.fixture
def trained(world, tmp_path):
    """trained(name, shifts, key=value ...) -> a run whose boxes are off by these thousandths in turn."""

    def make(name, shifts=(50,), *settings):
        run = shutil.copytree(world, tmp_path / name)
        config = load_config(run / "config.yaml", [f"output_dir={run}", *settings])
        save_config(config, run / "config.yaml")
        texts = [answer_text(300, shifts[k % len(shifts)]) for k in range(COUNT)]
        write_jsonl([record_of(text, f"{k}.y4m") for k, text in enumerate(texts)], run / "predictions.jsonl")
        (run / "summary.json").write_text(json.dumps({"after": dict.fromkeys(compare.COLUMNS, 1.0)}))
        return run

    return make


def tables_of(runs):
    """The tables that are printed, as rows of cells."""
    text = compare.report(compare.read_groups(runs))
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in part] for part in parts]
    return [{row[0]: row[1:] for row in part if set(row[0]) != {"-"}} for part in cells]


def test_scores_and_differences_by_hand(trained):
    """A box 0.25 wide and off by d has IoU (0.25 - d) / (0.25 + d), which is its GIoU, and 2 d of L1: 2/3 and
    0.1 for d = 0.05; 1 and 0 for d = 0; 3/7 and 0.2 for d = 0.1."""
    old, new = trained("old"), trained("new", (0, 100), f"rewards.{OWN[:-1]}=0.5", "threads=7")
    (new / "rewards").mkdir()
    (new / "rewards/own.py").write_text("")  # the other run has no such file to compare with
    settings, table = tables_of([old, new])
    assert settings == {"": [str(old), str(new)], f"rewards.{OWN[:-1]}": ["-", "0.5"]}
    assert table[""] == [str(old), str(new), "difference [95 %]", ""]
    difference, verdict = table["m_vIoU"][2:]
    assert [cell.split(" -> ")[1] for cell in table["m_vIoU"][:2]] == ["66.7", "71.4"]  # (1 + 3/7) / 2
    assert difference.startswith("+4.8 [") and verdict == "no difference shown"
    # Half of the sentences lose: a standard error of 50 / sqrt(24), and 1.96 sqrt(1 + 2 ** 2) of them.
    difference, verdict = table["vIoU@0.5"][2:]
    low, high = map(float, difference.removeprefix("-50.0 [").removesuffix("]").split(", "))
    assert (low, high) == pytest.approx((-50 - 44.7, -50 + 44.7), abs=2.5) and verdict == "worse"
    assert [cell.split(" -> ")[1] for cell in table["spatial_pred"][:2]] == ["0.567", "0.614"]
    assert table["spatial_pred"][2].startswith("+0.048 [")
    assert table["m_tIoU"][2:] == ["+0.0 [+0.0, +0.0]", "no difference shown"]
    assert table["total"][2:] == ["", "other weights"]


def test_one_run_and_its_start(trained):
    """Before, a box off by 0.2 has IoU 1/9, and one of the 24 answers no box."""
    (table,) = tables_of([trained("one", (0,))])
    assert table["m_vIoU"][0] == f"{100 / 9 * 23 / 24:.1f} -> 100.0" and table["m_vIoU"][2] == "better"
    assert table["format"][0] == f"{23 / 24:.3f} -> 1.000" and table["total"][2] == "higher"


def test_other_weights_of_the_spatial_reward_make_another_term(trained):
    _, table = tables_of([trained("both"), trained("l1", (50,), "rewards.giou=0")])[:2]
    assert [name for name, row in table.items() if row[3] == "other weights"] == [
        *("spatial_think", "spatial_pred", "think", "total")
    ]
    assert table["temporal"][3] == "no difference shown"


def test_seeds_are_grouped(trained, tmp_path):
    """66.7 and 100: 83.3 ± 23.6. Names of seeds go; a seed that comes again is another group."""
    settings = ("kl_beta=0.5", "rewards.think=1.5")
    new = [trained(f"new_seed{k}", (50 * (1 - k),), f"seed={k}", *settings) for k in (0, 1)]
    old = [trained(f"old_seed{k}", (50,), f"seed={k}") for k in (1, 0)]
    changed, table = tables_of([*old, *new])[:2]
    heads = [f"{tmp_path}/old (2 seeds)", f"{tmp_path}/new (2 seeds)"]
    assert list(changed.items()) == [
        ("", heads),
        ("rewards.think", ["0.5", "1.5"]),
        ("kl_beta", ["0.01", "0.5"]),
    ]
    assert [cell.split(" -> ")[1] for cell in table["m_vIoU"][:2]] == ["66.7 ± 0.0", "83.3 ± 23.6"]
    copies = [shutil.copytree(run, tmp_path / f"copy_seed{k}") for k, run in zip((1, 0), old, strict=True)]
    groups = compare.read_groups([*old, *copies])
    assert "No setting differs" in compare.report(groups) and "One run each" not in compare.report(groups)
    assert "One run each" in compare.report(compare.read_groups([new[0], old[0], *copies]))
    assert [group.name for group in groups] == [f"{tmp_path}/{name} (2 seeds)" for name in ("old", "copy")]
    (old[0] / "rewards").mkdir()
    (copies[0] / "rewards").mkdir()
    (old[0] / "rewards/own.py").write_text("1")
    (copies[0] / "rewards/own.py").write_text("2")
    (changed, *_) = tables_of([old[0], copies[0]])
    assert list(changed) == ["", "rewards, text of own.py"]


def of_one(values):
    """Values of S sentences in each of K runs, of one term."""
    return np.array(values, dtype=float).reshape(len(values), -1, 1)


def test_the_bootstrap_is_that_of_all_resamples(monkeypatch):
    """Of five sentences there are 5 ** 5, here without the seeds' part."""
    monkeypatch.setattr(compare, "UNKNOWN_SEEDS", 0)
    first, second = [[3, 1, 4, 1, 5]], [[12.3, 1.9, 6.6, 0.4, 13.8]]
    every = [np.mean(d) for d in itertools.product(np.subtract(second, first)[0], repeat=5)]
    expected = [np.mean(every), *np.percentile(every, [2.5, 97.5])]
    (found,) = compare.intervals(of_one(first), of_one(second))
    assert found == pytest.approx(expected, abs=0.15) and found[0] == pytest.approx(expected[0])


def test_the_seeds_part():
    """Runs of 10, 12, 17 and of 20, 20, 20: a pooled variance of 26 / 4 with four degrees of freedom, whose t
    is 2.776. Sentences that are all alike add nothing."""
    (found,) = compare.intervals(of_one([[mean] * 50 for mean in (10, 12, 17)]), of_one([[20] * 50] * 3))
    half = 2.776 * (26 / 4 * (1 / 3 + 1 / 3)) ** 0.5
    assert found == pytest.approx([7, 7 - half, 7 + half], abs=0.4)


def shares(runs, effect, own, shift, pairs=100):
    """How many of so many pairs of groups are said to differ, for worse and for better. Made-up vIoUs of 256
    sentences, which are 20 points apart. own, shift: standard deviation of what a run changes in a sentence,
    and in all of them."""
    rng, said = np.random.default_rng(runs), []
    for _ in range(pairs):
        easy = rng.normal(50, 20, 256)
        noise = rng.normal(0, own, (2, runs, 256)) + rng.normal(0, shift, (2, runs, 1))
        ((_, low, high),) = compare.intervals(of_one(easy + noise[0]), of_one(easy + noise[1] + effect))
        said.append((high < 0, low > 0))
    return np.mean(said, axis=0)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_seeds_of_one_reward_show_no_difference(monkeypatch, runs):
    """In at least 9 of 10 pairs, where seeds differ as the toy's do: by 0.9 points beside what happens to
    single sentences. With several runs also where they differ much more."""
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    assert shares(runs, 0, 7, 0.9).sum() <= 0.1
    assert runs == 1 or shares(runs, 0, 7, 5).sum() <= 0.1


@pytest.mark.parametrize("runs, own, shift, least", [(1, 4, 0, 0.9), (3, 7, 0.9, 0.7), (5, 7, 0.9, 0.9)])
def test_three_planted_points_are_found(monkeypatch, runs, own, shift, least):
    """With one run only where the seed changes little; with three or five where it does what it does in the
    toy."""
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    worse, better = shares(runs, 3, own, shift)
    assert better >= least and worse == 0


REFUSED = {  # a setting of the second run -> what is said
    "eval_limit=5": "eval_limit is 5, in .*old all; leave one of them out",
    "fps=1": "fps is 1.0, in .*old 2.0",
    "time_unit=frame": "time_unit is frame, in .*old second",
    "eval_temperature=0.5": "eval_temperature is 0.5, in .*old 0.0",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_runs_that_were_asked_otherwise(trained, setting):
    with pytest.raises(DataError, match=f"/new: {REFUSED[setting]}"):
        compare.read_groups([trained("old"), trained("new", (50,), setting)])


def test_a_run_named_twice(trained, monkeypatch):
    run = trained("old")
    monkeypatch.chdir(run.parent)
    with pytest.raises(DataError, match="old is named twice"):
        compare.read_groups([run, run.relative_to(run.parent)])


def edit(path, change):
    records = read_jsonl(path)
    records[3] |= change
    write_jsonl(records, path)


@pytest.mark.parametrize(
    "spoil, what",
    [
        (
            lambda run: edit(run / "predictions.jsonl", {"id": "x"}),
            "predictions.jsonl: has no answer to '3.y4m'",
        ),
        (
            lambda run: edit(run / "predictions_before.jsonl", {"truth": {}}),
            "no answer to .* as it is in .*all.json .* of one split",
        ),
        (lambda run: edit(run / "predictions.jsonl", {"rewards": {"think": "1"}}), "must be numbers"),
        (lambda run: edit(run / "predictions.jsonl", {"rewards": None}), "must be numbers"),
        (
            lambda run: (run / "predictions_before.jsonl").unlink(),
            "there is no such file; train this run again",
        ),
        (
            lambda run: (run / "summary.json").unlink(),
            "new: is no finished run .* finish it, or leave it out",
        ),
    ],
)
def test_runs_without_these_answers(trained, spoil, what):
    old, new = trained("old"), trained("new")
    spoil(new)
    with pytest.raises(DataError, match=what) as caught:
        compare.read_groups([old, new])
    assert str(new) in str(caught.value)


def test_few_sentences_show_nothing(trained):
    """Of three, all would be better in every resample."""
    assert tables_of([trained("one", (0,), "eval_limit=3")])[0]["m_vIoU"][2] == "no difference shown"


def test_without_matplotlib_the_text_comes(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lab.pictures", None)
    run = trained("one")
    compare.main([str(run)])
    printed = capsys.readouterr().out
    assert "| m_vIoU " in printed and printed.endswith("requirements-dev.txt\n")
    assert not (run / "compared").exists()
