"""Two ranks against one: the same rollouts, losses and weights. What ends a run on ranks, and resumes it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from tiny_runs import SHORT, assert_same, metrics_of, read_lines, weights_of
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import runtime.run
import train
from config import ConfigError, load_config
from model import completion_logprobs, encode_prompt, pack_completions, rollout
from qwen.checkpoint import load_policy
from runtime import distributed
from runtime.files import DataError
from runtime.run import check_start, global_batch, open_run
from video.loader import FrameLoader

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def configure(write_config, taught):
    """configure(folder, key=value, ...) -> folder/config.yaml: two steps of a tiny model whose answers are
    mostly right in form, in folder/run."""
    short = {**SHORT, "model": str(taught / "checkpoint"), "batch_size": 4, "micro_batch": 4, "eval_limit": 2}
    short |= {"learning_rate": 1e-4, "kl_beta": 0.05}
    return lambda folder, **settings: write_config(folder, **{**short, **settings})


@pytest.fixture(scope="module")
def run_on(tmp_path_factory, configure):
    """run_on(ranks, key=value, ...) -> folder of a run on forked ranks."""

    def run(ranks, **settings):
        folder = tmp_path_factory.mktemp("run")
        on_ranks(ranks, train.main, [configure(folder, **settings)])
        return folder / "run"

    return run


def torchrun(arguments, folder, *options):
    """train.py on two ranks by torchrun, as a process; without pictures."""
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['lab.pictures'] = None")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(ROOT / "train.py"), *arguments], env=environment, **pipes)


def opened(path):
    """What open_run says on this rank; rank 0 alone may read the folder's config.yaml."""
    config = load_config(path, ["resume=auto"])
    if distributed.init()[0] == 1:
        runtime.run.load_config = None
    try:
        with open_run(config, None, None, [], started=0) as run:
            return run.progress.step
    except ConfigError as error:
        return str(error)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def assert_close(run, wanted):
    """Two runs up to the rounding of sums in another order. Adam moves each weight by about the learning
    rate, also one whose gradient is only rounding: what counts is how far all weights together went."""
    for line, other in zip(metrics_of(run), metrics_of(wanted), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"phase", "warning"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    weights, others = (weights_of(folder / "checkpoint") for folder in (run, wanted))
    start = weights_of(Path(load_config(run / "config.yaml").model))  # adapters begin as B = 0
    assert weights.keys() == others.keys()
    apart = torch.cat([(weights[name] - others[name]).flatten() for name in weights])
    names = [name for name in others if ".lora_A." not in name]
    moved = torch.cat([(others[name] - start.get(name, 0)).flatten() for name in names])
    assert apart.norm() < 0.02 * moved.norm() and moved.abs().max() > 1e-4


@pytest.fixture(scope="module")
def one(run_on):
    return run_on(1)


@pytest.fixture(scope="module")
def two(tmp_path_factory, configure):
    """A run on two ranks by torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    process = torchrun([configure(folder)], folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder / "run"


def test_torchrun(one, two):
    """Two ranks of torchrun do what one process does."""
    rollouts = read_lines(one / "rollouts.jsonl")
    assert len(rollouts) == 2 * 4 * 4 and any(record["advantage"] for record in rollouts)
    assert rollouts == read_lines(two / "rollouts.jsonl")
    assert read_lines(one / "watched.jsonl") == read_lines(two / "watched.jsonl")
    assert_close(two, one)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"rollout_batch": 3, "micro_batch": 1, "reuse_prompts": True}),
        (2, {"rollout_batch": 1, "micro_batch": 1, "sync_gradients": "every"}),
        (2, {"micro_batch": 1, "reuse_prompts": True}),
    ],
)
def test_ranks_and_parts_change_nothing(run_on, one, ranks, settings):
    other = run_on(ranks, **settings)
    assert read_lines(other / "rollouts.jsonl") == read_lines(one / "rollouts.jsonl")
    assert_close(other, one)


SFT = {"sft": {"steps": 2, "learning_rate": 1e-3, "batch_size": 4}, "steps": 1}


@pytest.mark.parametrize("settings", [{"lora": {"rank": 4}}, {"freeze_vision": True}, SFT], ids=str)
def test_kinds_of_training(run_on, settings, capsys):
    """Adapters, a frozen tower, supervised steps whose result is the reference: two ranks do what one does,
    and evaluate.py takes the checkpoint as any."""
    one, two = (run_on(ranks, learning_rate=1e-3, **settings) for ranks in (1, 2))
    assert_close(two, one)
    lines, weights = metrics_of(two), weights_of(two / "checkpoint")
    if "sft" in settings:
        assert [line["phase"] for line in lines] == ["eval", "sft", "sft", "grpo", "eval"]
        assert lines[3]["kl"] == 0
    else:
        assert lines[1]["kl"] == 0 < lines[2]["kl"]
    if "freeze_vision" in settings:
        start = weights_of(Path(load_config(two / "config.yaml").model))
        still = {name for name in start if torch.equal(start[name], weights[name])}
        assert still == {name for name in start if "visual" in name}
    if "lora" in settings:
        assert all(".lora_" in name for name in [*weights, *state_of(two)])
    (two / "predictions.jsonl").rename(two / "predictions_then.jsonl")
    evaluate.main([str(two), "--json"])
    assert json.loads(capsys.readouterr().out)["native"]["m_tIoU"] == lines[-1]["m_tIoU"]
    assert (two / "predictions.jsonl").read_text() == (two / "predictions_then.jsonl").read_text()


def state_of(run):
    return {
        k: v for path in (run / "checkpoint/state").glob("*.safetensors") for k, v in load_file(path).items()
    }


def test_bf16(run_on):
    """Weights are fp32 while they are trained, and bf16 in the export; policy and reference begin as the same
    function. One rank, two, and evaluate.py sample the same; after a step gradients are rounded otherwise."""
    one, two = (run_on(ranks, steps=1, precision="bf16") for ranks in (1, 2))
    for name in ("predictions_before.jsonl", "rollouts.jsonl"):
        first, second = ([r["completion"] for r in read_lines(run / name)] for run in (one, two))
        assert first == second
    assert {value.dtype for value in weights_of(two / "checkpoint").values()} == {torch.bfloat16}
    kept = {rows.dtype for name, rows in state_of(two).items() if not name.endswith(".step")}
    assert kept == {torch.float32}
    assert metrics_of(two)[1]["kl"] == 0 and metrics_of(two)[1]["ratio_max"] == 1
    (two / "predictions.jsonl").rename(two / "predictions_then.jsonl")
    evaluate.main([str(two)])
    assert (two / "predictions.jsonl").read_text() == (two / "predictions_then.jsonl").read_text()


class Heard(TorchDispatchMode):
    """The names of what is exchanged with other ranks."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names += [str(function)] if "c10d" in str(function) else []
        return function(*arguments, **(keywords or {}))


def unequal(base):
    """One rank samples 3 tokens an answer, the other 60; then both take three backward passes together."""
    rank, _ = distributed.init()
    policy = load_policy(str(base))
    policy.eos_ids = []  # nothing ends an answer but its length
    distributed.shard(policy.model, policy.blocks, torch.float32)
    frames = torch.full((4, 56, 56, 3), 60 * rank, dtype=torch.uint8)
    prompt = encode_prompt(policy, frames, "Where is the red circle?", (1000, 1000), 2.0)
    with distributed.unsharded(policy.model), Heard() as heard:
        (group,) = rollout(policy, [prompt], 2, (3, 60)[rank], 1.0, [(rank,)])
    tokens, sampling, exchanges = len(group[0].ids), len(heard.names), {}
    policy.model.train()
    batch = pack_completions(policy, [prompt], [[c.ids for c in group]])
    for way in ("last", "every"):
        exchanges[way] = []
        for part in range(3):
            distributed.sync_gradients(policy.model, way == "every" or part == 2)
            with Heard() as heard:
                (completion_logprobs(policy, batch, 1.0).mean() / 3).backward()
            exchanges[way].append(sum("reduce_scatter" in name for name in heard.names))
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1e9).full_tensor().item()
        policy.model.zero_grad()
    return tokens, sampling, exchanges, norm


def test_answers_of_unequal_length(checkpoints):
    """Nothing is exchanged while answers are sampled. Of a step's backward passes the last alone exchanges
    each group's gradients, or each of them does. (A decoder layer is passed twice, by answers and by prompts:
    what was kept is exchanged after the first, what the second adds after that.)"""
    (first, *rest), (second, *others) = on_ranks(2, unequal, checkpoints["qwen2_5_vl"])
    assert (first, second) == (3, 60) and rest == others
    sampling, exchanges, norm = rest
    layers, groups = 2, 2 + 2 + 1  # decoder layers, vision blocks, the rest
    assert sampling == 0 and norm > 0
    assert exchanges == {"last": [0, 0, groups + layers], "every": [groups] * 3}


def test_a_rank_without_a_video(tmp_path, configure, run_on, world):
    """on_bad_video: skip, and the second of two ranks has nothing in a step: it borrows, with no effect."""
    (tmp_path / "videos").mkdir()
    settings = {"micro_batch": 1, "steps": 1, "on_bad_video": "skip", "eval_limit": 1, "reuse_prompts": True}
    settings |= {"sft": {"steps": 1, "learning_rate": 1e-3, "batch_size": 4}}
    settings |= {"videos": str(tmp_path / "videos")}
    config = load_config(configure(tmp_path, **settings))
    samples, _ = evaluate.load_split(config, config.train_annotations)
    bad = {sample.id for sample in global_batch(samples, 4, 0, config.seed)[2:]}
    for path in world.iterdir():
        (tmp_path / "videos" / path.name).write_bytes(b"no video" if path.name in bad else path.read_bytes())
    one, two = run_on(1, **settings), run_on(2, **settings)
    assert metrics_of(one, "sft")[0]["grad_norm"] > 0 and metrics_of(one, "grpo")[0]["prompts"] == 2
    assert_close(two, one)


@pytest.mark.parametrize(("key", "size", "near"), [("batch_size", 100, "96 or"), ("sft.batch_size", 3, "8")])
def test_a_batch_that_does_not_divide(tmp_path, configure, monkeypatch, key, size, near):
    config = load_config(configure(tmp_path, batch_size=8), [f"{key}={size}", "sft.steps=1"])
    monkeypatch.setattr(distributed, "init", lambda: (0, 8))
    with pytest.raises(ConfigError, match=f"{key}: {size} prompts .* 8 ranks; {near} "):
        check_start(config)


def rank0_fails():
    def fail():
        raise DataError(f"of rank {distributed.init()[0]}")

    with pytest.raises(DataError) as caught:
        distributed.on_rank0(fail)
    return str(caught.value), distributed.on_rank0(lambda: distributed.init()[0])


def test_an_error_of_rank_0_reaches_all():
    assert on_ranks(2, rank0_fails) == [("of rank 0", 0)] * 2


def second_rank_sees_a_file(arguments):
    """The second rank looks for config.yaml when the first one has made it already."""
    if distributed.init()[0] == 1:
        is_file = Path.is_file
        Path.is_file = lambda path: path.name == "config.yaml" or is_file(path)
    train.main(arguments)


def test_the_first_rank_decides_whether_a_run_resumes(tmp_path, configure):
    on_ranks(2, second_rank_sees_a_file, [configure(tmp_path, steps=0, max_new_tokens=2), "resume=auto"])
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 0]


def main_with_a_signal(arguments, call, number=signal.SIGTERM):
    """train.main; the last rank gets a signal when it reads its `call`-th video."""
    frames, calls = FrameLoader.frames, []

    def signalled(*words):
        calls.append(1)
        if len(calls) == call and distributed.init()[0] == distributed.init()[1] - 1:
            signal.raise_signal(number)
        return frames(*words)

    FrameLoader.frames = signalled
    train.main(arguments)


def test_a_signal_to_one_rank_ends_all_after_the_step(tmp_path, configure, two):
    """The run then resumes as if nothing had happened."""
    path, run = configure(tmp_path), tmp_path / "run"
    on_ranks(2, main_with_a_signal, [path], 2, signal.SIGINT)  # after a video of the evaluation, in step 1
    assert [line["step"] for line in metrics_of(run)] == [0, 1] and (run / "checkpoint_1/state").is_dir()
    on_ranks(2, train.main, [path, "resume=auto"])
    assert_same(run, two)


def test_a_signal_in_an_evaluation(tmp_path, configure, capfd):
    """It ends between two answers; the answers stay, and are not asked for again."""
    path, run = configure(tmp_path, eval_limit=6, max_new_tokens=8, steps=0, eval_batch=1), tmp_path / "run"
    on_ranks(1, main_with_a_signal, [path], 3)
    assert "stopped after step 0; resume with" in capfd.readouterr().out
    assert not (run / "predictions_before.jsonl").exists()
    answers = len(read_lines(run / "predictions_before.rank0.jsonl"))
    assert 1 <= answers < 6
    on_ranks(1, train.main, [path, "resume=auto"])
    assert f"{answers} answers are in {run}/ already" in capfd.readouterr().err
    assert len(read_lines(run / "predictions_before.jsonl")) == 6 and not Path(f"{run}.1").exists()


def test_a_second_signal_is_obeyed_at_once():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with distributed.Stop() as stop:
            assert not stop.agreed()
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed() and not heard
            signal.raise_signal(signal.SIGTERM)
            assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_sigterm_to_torchrun(tmp_path, configure, two):
    """All ranks end together after a step, with a checkpoint, from which the run resumes."""
    path, run = configure(tmp_path, save_every=1), tmp_path / "run"
    process = torchrun([path], tmp_path)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()  # torchrun itself ends with a code of its own
    (step,) = re.findall(r"^stopped after step (\d); resume with", out, re.M) or [err]
    assert metrics_of(run)[-1]["step"] == int(step)
    on_ranks(2, train.main, [path, "resume=auto"])
    assert_same(run, two)


def test_kill_9_and_torchrun_starts_again(tmp_path, configure, two):
    """One rank dies; torchrun starts both again, and the run ends as if nothing had happened. (`python
    tests/kill.py` kills at many moments.)"""
    path, run = configure(tmp_path, save_every=1), tmp_path / "run"
    process = torchrun([path, "resume=auto"], tmp_path, "--max-restarts=1")
    wait_for(run / "checkpoint_1", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0 and "resuming from" in out, err
    assert_same(run, two)


def error_of(arguments):
    with pytest.raises(FloatingPointError) as caught:
        train.main(arguments)
    return str(caught.value)


def test_a_reward_that_fails(tmp_path, configure, monkeypatch):
    """On one of two ranks, in the second step: both stop with the answer and the batch; the rest is kept."""
    (tmp_path / "mine.py").write_text(
        "import os, pathlib\n"
        "def f(answer, truth):\n"
        f"    log = pathlib.Path('{tmp_path}/run/metrics.jsonl')\n"
        "    again = log.exists() and 'grpo' in log.read_text()\n"
        "    return 1 / (not again or os.environ['RANK'] != '1')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = configure(tmp_path, steps=9, rewards={f"{tmp_path}/mine.py:f": 1})
    first, second = on_ranks(2, error_of, [path])
    assert first == second and "mine.py:f raised ZeroDivisionError" in first and "'<time>" in first
    assert first.partition("The batch was ")[2].count(".y4m") == 4  # of both ranks
    assert (tmp_path / "run/checkpoint_1/state/progress.json").is_file()


def test_rank_0_looks_and_the_others_are_told(tmp_path, configure):
    """At a folder of another run, which it moves aside; at one that is no run; at a damaged config.yaml."""
    path, run = configure(tmp_path), tmp_path / "run"
    run.mkdir()
    for text, said in (("steps: 1", 0), ("steps: [", "config.yaml"), (None, "is no run of train.py")):
        (run / "config.yaml").unlink(missing_ok=True)
        (run / ("config.yaml" if text else "mine")).write_text(text or "")
        results = on_ranks(2, opened, path)
        assert results[0] == results[1] and (said == results[0] or said in results[0]), results
    assert (tmp_path / "run.1/config.yaml").read_text() == "steps: 1"
