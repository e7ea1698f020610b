"""Many ranks against one: the same rollouts, losses and weights. And what ends a run, and how it goes on."""

import datetime
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
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from steps import optimizer_step
from test_lora import adapters_of, learn, on_two_ranks
from test_model import make_prompts

import evaluate
import train
from config import Config
from qwen import checkpoint
from qwen.checkpoint import load_policy
from runtime import distributed, logs, run
from runtime.checkpoints import Progress

ROOT = Path(__file__).parent.parent.parent
TIMED = ("seconds", "tokens_per_second", "peak_memory")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def torchrun(ranks, arguments, cwd, *options):
    """train.py by torchrun, as a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*command, *options, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=240):
    """(exit code, stdout, stderr), and no hang."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------
# The same run on any number of ranks


TOY = {"model": str(ROOT / "checkpoints/toy"), "max_new_tokens": 192, "num_generations": 4, "batch_size": 8}
TOY |= {"steps": 5, "learning_rate": 1e-4, "eval_limit": 6, "kl_beta": 0.05, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_config):
    """(ranks, rollout_batch, sync_gradients, reuse_prompts) -> folder of a run of five steps of the toy's
    checkpoint."""
    folders = {}

    def run(ranks, rollout_batch, sync_gradients="last", reuse_prompts=False):
        key = ranks, rollout_batch, sync_gradients, reuse_prompts
        if key not in folders:
            folder = tmp_path_factory.mktemp("parallel")
            settings = {"rollout_batch": rollout_batch, "micro_batch": min(rollout_batch, 4)}
            settings |= {"sync_gradients": sync_gradients, "reuse_prompts": reuse_prompts}
            config = write_config(folder, **TOY, **settings)
            if ranks == 1:
                train.main([config])
            else:
                code, _, err = finish(torchrun(ranks, [config], folder))
                assert code == 0, err
            folders[key] = folder / "run"
        return folders[key]

    return run


@pytest.mark.parametrize(
    "other",
    [(1, 4), (1, 1), (1, 2, "last", True), (2, 4), (2, 1, "each"), (2, 2, "last", True), (4, 2)],
    ids=lambda key: "-".join(map(str, key)),
)
def test_ranks_and_parts_change_nothing(runs, other):
    """Against one process that takes the batch of eight whole: cut into 2 x 4 or 8 x 1, and spread over two
    and four ranks, with one exchange of gradients a step or one a part, its prompts read anew for the update
    or kept from the rollout."""
    one, many = runs(1, 8), runs(*other)
    rollouts, expected = (read_lines(run / "rollouts.jsonl") for run in (many, one))
    assert len(rollouts) == 5 * 8 * 4 and any(r["advantage"] for r in rollouts)
    assert [r["completion"] for r in rollouts] == [r["completion"] for r in expected]
    assert rollouts == expected
    for line, wanted in zip(
        read_lines(many / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True
    ):
        assert line.keys() == wanted.keys()
        assert line["phase"] == wanted["phase"]
        for name in line.keys() - {"phase", *TIMED}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    start = load_file(ROOT / "checkpoints/toy/model.safetensors")
    weights, wanted = (load_file(run / "checkpoint/model.safetensors") for run in (many, one))
    assert weights.keys() == wanted.keys() == start.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=1e-5)
    assert max((wanted[name] - start[name]).abs().max() for name in start) > 1e-4


@pytest.mark.parametrize("setting", ["lora.rank=4", "freeze_vision=true"])
def test_adapters_and_a_frozen_tower(tmp_path, write_config, setting, capsys):
    """Two ranks do what one does; what was frozen has not moved; evaluate.py takes the checkpoint as any."""
    lines, weights = {}, {}
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        config = write_config(tmp_path, **{**TOY, "steps": 3, "learning_rate": 1e-3, "output_dir": str(run)})
        if ranks == 1:
            train.main([config, setting])
        else:
            code, _, err = finish(torchrun(2, [config, setting], tmp_path))
            assert code == 0, err
        lines[ranks] = read_lines(run / "metrics.jsonl")
        (path,) = (run / "checkpoint").glob("*.safetensors")
        weights[ranks] = load_file(path)
    for line, wanted in zip(lines[2], lines[1], strict=True):
        for name in wanted.keys() - {"phase", *TIMED}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    assert lines[1][1]["kl"] == 0 < lines[1][3]["kl"]
    for name in weights[1]:
        torch.testing.assert_close(weights[2][name], weights[1][name], rtol=0, atol=1e-5)
    start = load_file(ROOT / "checkpoints/toy/model.safetensors")
    if setting == "freeze_vision=true":
        still = {name for name in start if torch.equal(start[name], weights[1][name])}
        assert still == {name for name in start if "visual" in name}
    else:
        assert path.name == "adapter_model.safetensors" and all(".lora_" in name for name in weights[1])
        state = {name.removeprefix("model.") for name in dcp_names(run / "checkpoint/state")}
        assert state and all(".lora_" in name for name in state)
    capsys.readouterr()
    evaluate.main([str(run), "--json"])
    out, err = capsys.readouterr()
    assert "all of them from before" in err  # the fingerprint of the checkpoint is that of the run's end
    assert json.loads(out)["native"]["m_tIoU"] == lines[2][-1]["m_tIoU"]
    (run / "predictions.jsonl").unlink()
    evaluate.main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["native"] == json.loads(out)["native"]


def dcp_names(state):
    return dcp.FileSystemReader(state).read_metadata().state_dict_metadata


def test_bf16_on_any_number_of_ranks(tmp_path, write_config, capsys):
    """Weights are fp32 while they are trained, and bf16 in the export; policy and reference begin as the same
    function. One rank, two, and evaluate.py compute the same: answers differ only after the first step, when
    gradients of another split have been rounded."""
    before, rollouts = {}, {}
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        settings = {**TOY, "steps": 1, "precision": "bf16", "output_dir": str(run)}
        code, _, err = finish(torchrun(ranks, [write_config(tmp_path, **settings)], tmp_path))
        assert code == 0, err
        before[ranks] = [record["completion"] for record in read_lines(run / "predictions_before.jsonl")]
        rollouts[ranks] = [record["completion"] for record in read_lines(run / "rollouts.jsonl")]
        exported = load_file(run / "checkpoint/model.safetensors")
        assert {value.dtype for value in exported.values()} == {torch.bfloat16}
        assert json.loads((run / "checkpoint/config.json").read_text())["dtype"] == "bfloat16"
        kept = dcp_names(run / "checkpoint/state")
        assert {kept[name].properties.dtype for name in kept if "step" not in name} == {torch.float32}
        metrics = read_lines(run / "metrics.jsonl")[1]
        assert metrics["kl"] == 0 and metrics["ratio_max"] == 1
        after = (run / "predictions.jsonl").read_text()
        (run / "predictions.jsonl").unlink()
        evaluate.main([str(run)])
        assert (run / "predictions.jsonl").read_text() == after
    assert before[1] == before[2] and rollouts[1] == rollouts[2]


def test_supervised_steps(tmp_path, write_config):
    """Three of them and one of reinforcement, whose reference they have made: the same on two ranks."""
    sft = {"steps": 3, "learning_rate": 1e-3, "batch_size": 4}
    lines, weights = {}, {}
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        config = write_config(tmp_path, sft=sft, steps=1, kl_beta=0.1, output_dir=str(run), eval_limit=2)
        if ranks == 1:
            train.main([config])
        else:
            code, _, err = finish(torchrun(2, [config], tmp_path))
            assert code == 0, err
        lines[ranks] = read_lines(run / "metrics.jsonl")
        weights[ranks] = load_file(run / "checkpoint/model.safetensors")
        assert (run / "checkpoint_sft_3/state/progress.json").is_file()
    assert [line["phase"] for line in lines[1]] == ["eval", "sft", "sft", "sft", "grpo", "eval"]
    assert lines[1][1]["loss"] > lines[1][3]["loss"] and lines[1][4]["kl"] == 0
    for line, wanted in zip(lines[2], lines[1], strict=True):
        assert line.keys() == wanted.keys()
        for name in wanted.keys() - {"phase", *TIMED}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    for name in weights[1]:
        torch.testing.assert_close(weights[2][name], weights[1][name], rtol=0, atol=1e-5)


def test_a_batch_that_does_not_divide(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(train.distributed, "join", lambda: (0, 8))
    for setting, nearest in {"batch_size=100": "96 or 104", "batch_size=3": "8"}.items():
        size = setting.partition("=")[2]
        with pytest.raises(
            train.ConfigError,
            match=f"^batch_size: {size} prompts do not divide among 8 ranks; {nearest} would$",
        ):
            train.main([write_config(tmp_path), setting])
    message = r"^sft.batch_size: 12 prompts do not divide among 8 ranks; 8 or 16 would$"
    with pytest.raises(train.ConfigError, match=message):
        train.main([write_config(tmp_path), "batch_size=8", "sft.steps=1", "sft.batch_size=12"])


def test_answers_of_unequal_length(tmp_path):
    """One rank samples 3 tokens an answer and the other 200, without a word between them; then both take a
    step together and come to the same gradient norm. (That it is the right one: the runs above.) Of its three
    backward passes the last alone exchanges gradients, for each group of weights, or each of them does. (A
    decoder layer is passed twice, by answers and by prompts. What has been kept for the last is exchanged
    after the first of them, what they add after the second.)"""
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL.format(root=ROOT, model=ROOT / "checkpoints/toy", folder=tmp_path))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    # In files: what two processes print at the same moment may come in one line.
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    first, second = said
    assert (first["tokens"], second["tokens"]) == (3, 200)
    groups = 3 + 2 + 1  # decoder layers, vision blocks, the rest
    for record in said:
        assert record["sampling"] == 0
        assert record["gradients"] == {"last": [0, 0, groups + 3], "each": [groups] * 3}
    assert first["norm"] == second["norm"] > 0


UNEQUAL = """
import json, sys
sys.path[:0] = ["{root}"]
import torch, distributed, files
from torch.utils._python_dispatch import TorchDispatchMode
from model import completion_logprobs, encode_prompt, pack_completions, rollout
from policy import load_policy
from steps import backward
from config import Config

class Heard(TorchDispatchMode):
    "What is said to the other rank."
    def __enter__(self):
        self.names = []
        return super().__enter__()
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "c10d" in str(function):
            self.names.append(str(function))
        return function(*arguments, **(keywords or {{}}))

torch.set_num_threads(1)
rank, _ = distributed.init()
policy = load_policy("{model}", dtype="auto")
policy.eos_ids = []  # nothing ends an answer but its length
distributed.shard(policy.model, policy.blocks, torch.float32)
frames = torch.full((4, 56, 56, 3), 60 * rank, dtype=torch.uint8)
prompt = encode_prompt(policy, frames, "Where is the red circle?", (1000, 1000), 2.0)
with distributed.unsharded(policy.model):
    with Heard() as heard:
        (group,) = rollout(policy, [prompt], 2, (3, 200)[rank], 1.0, [(rank,)])
record = {{"tokens": len(group[0].ids), "sampling": len(heard.names)}}
policy.model.train()
batch = pack_completions(policy, [prompt], [[c.ids for c in group]])
record["gradients"] = {{}}
for way in ("last", "each"):
    counts = []
    for part in range(3):
        with Heard() as heard:
            loss = -completion_logprobs(policy, batch, 1.0).mean() / 3
            backward(loss, policy, part == 2, Config(sync_gradients=way))
        counts.append(sum("reduce_scatter" in name for name in heard.names))
    record["gradients"][way] = counts
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1e9).full_tensor()
    record["norm"] = float(norm)
    policy.model.zero_grad()
with open(f"{folder}/rank{{rank}}.json", "w") as file:
    json.dump(record, file)
distributed.destroy()
files.leave_process(0)
"""


@pytest.mark.parametrize("reuse_prompts", [False, True])
def test_a_rank_without_a_video(tmp_path, write_config, world, reuse_prompts):
    """on_bad_video: skip, and the second of two ranks has nothing in a step: it goes along with the other,
    whose two parts are the step as if it were alone."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in world.iterdir():
        (videos / path.name).write_bytes(path.read_bytes())
    settings = {**TOY, "batch_size": 4, "micro_batch": 1, "steps": 1, "on_bad_video": "skip"}
    settings |= {"reuse_prompts": reuse_prompts}
    settings |= {"videos": str(videos), "eval_limit": 1}
    config = train.load_config(write_config(tmp_path, **settings))
    samples = train.load_split(config, config.train_annotations)[0]
    for bad in train.batch_of(samples, 4, 0, config.seed)[2:]:
        (videos / bad.id).write_bytes(b"no video")
    lines = {}
    for ranks in (1, 2):
        config = write_config(tmp_path, **settings, output_dir=str(tmp_path / f"run{ranks}"))
        code, _, err = finish(torchrun(ranks, [config], tmp_path))
        assert code == 0, err
        lines[ranks] = read_lines(tmp_path / f"run{ranks}/metrics.jsonl")
    assert [line.get("prompts") for line in lines[1]] == [None, 2, None] and lines[1][1]["grad_norm"] > 0
    for line, wanted in zip(lines[2], lines[1], strict=True):
        for name in wanted.keys() - {"phase", *TIMED}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


def clip_job(rank, folder, checkpoint):
    policy = load_policy(checkpoint)
    distributed.shard(policy.model, policy.blocks, torch.float32)
    policy.model.train()
    before = [p.detach().full_tensor().clone() for p in policy.model.parameters()]
    learn(policy, make_prompts(policy), [rank], 2)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    norm = optimizer_step(policy, optimizer, Config(max_grad_norm=0.1), 0.0)
    after = [p.detach().full_tensor() for p in policy.model.parameters()]
    moved = torch.cat([(new - old).flatten() for new, old in zip(after, before, strict=True)]).norm()
    return norm, float(moved)


def test_the_whole_gradient_is_clipped(checkpoints, tmp_path):
    """By its norm over both ranks: plain descent then moves the weights that far."""
    first, second = on_two_ranks(clip_job, tmp_path, str(checkpoints["qwen2_5_vl"]))
    assert first == second and first[0] > 0.2
    assert first[1] == pytest.approx(0.1, rel=1e-3)


def test_usage_of_two_ranks(monkeypatch):
    """Seconds are the mean of the ranks, the peak is the largest."""

    def other(value):
        return [value, {k: v + 2 for k, v in value.items()} if isinstance(value, dict) else value + 1]

    monkeypatch.setattr(distributed, "gather", other)
    monkeypatch.setattr(run.clock, "split", lambda: {"step": 2.0, "wait": 0.0})
    monkeypatch.setattr(logs, "peak_memory", lambda: 5.0)
    assert run.usage(12) == {"tokens_per_second": 4, "peak_memory": 6, "seconds": {"step": 3, "wait": 1}}


def test_the_seed_draws_the_adapters(tmp_path, write_config):
    """And nothing else."""
    path, made = write_config(tmp_path), []
    for seed in (0, 0, 1):
        policy = checkpoint.load_trainable(train.load_config(path, ["lora.rank=2", f"seed={seed}"]))
        made.append(torch.cat([p.flatten() for p in adapters_of(policy).values()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def open_late(rank, folder, path):
    distributed.TIMEOUT = datetime.timedelta(seconds=60)
    time.sleep(rank)  # by then the first one has made config.yaml
    config = train.load_config(path, ["resume=auto"])
    with run.open_run(config, {"settings": {}}) as (_, found, progress):
        return found, progress


def test_the_first_rank_decides_whether_a_run_goes_on(tmp_path, write_config):
    results = on_two_ranks(open_late, tmp_path, write_config(tmp_path))
    assert results == [(None, Progress())] * 2


# ----------------------------------------------------------------------------------------------------------
# What ends a run


def wait_until(condition, process, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def two_at_work(tmp_path, write_config):
    """(process of torchrun, run folder) of a long run on two ranks that has done its first step."""
    run = tmp_path / "run"
    process = torchrun(2, [write_config(tmp_path, **{**TOY, "steps": 500})], tmp_path)
    wait_until(lambda: logged(run) >= 2, process)
    return process, run


def signal_second_rank(process, number):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step(tmp_path, write_config, number):
    """Exit code 0, one line that says how to go on, and a checkpoint of the very step; then it goes on."""
    path, run = write_config(tmp_path, **{**TOY, "steps": 500}), tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: logged(run) >= 3, process)  # the evaluation and two steps
    process.send_signal(number)
    code, out, _ = finish(process)
    assert code == 0
    said = r"^stopped after step (\d+); go on with: the same command and resume=auto$"
    step = int(re.findall(said, out, re.M)[0])
    assert (run / f"checkpoint_{step}/state/progress.json").is_file()
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == step
    train.main([path, "resume=auto", f"steps={step + 1}"])
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [*range(step + 2), step + 1]


def test_a_signal_to_torchrun_ends_all_ranks_together(tmp_path, write_config):
    process, run = two_at_work(tmp_path, write_config)
    process.send_signal(signal.SIGTERM)
    _, out, _ = finish(process)  # torchrun itself ends with a code of its own
    (step,) = re.findall(r"^stopped after step (\d+); go on", out, re.M)
    assert (run / f"checkpoint_{step}/state/progress.json").is_file()


def test_a_signal_to_one_rank_ends_all(tmp_path, write_config):
    process, _ = two_at_work(tmp_path, write_config)
    signal_second_rank(process, signal.SIGTERM)
    code, out, err = finish(process, timeout=60)
    assert code == 0 and "stopped after step " in out, err


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


def test_a_signal_in_an_evaluation(tmp_path, write_config):
    """It ends there, between two answers; the answers stay, and are not asked for again."""
    path, run = write_config(tmp_path, **TOY, eval_batch=1), tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((run / "predictions_before.rank0.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == 0 and "stopped after step 0" in out and not (run / "predictions_before.jsonl").exists()
    answers = len(read_lines(run / "predictions_before.rank0.jsonl"))
    assert 1 <= answers < 6
    process = subprocess.run([*command, "resume=auto", "steps=0"], capture_output=True, text=True)
    assert process.returncode == 0 and f"{answers} answers are in {run}/ already" in process.stderr
    assert len(read_lines(run / "predictions_before.jsonl")) == 6 and not Path(f"{run}.1").exists()


def test_a_dead_rank_ends_the_job(tmp_path, write_config):
    process, _ = two_at_work(tmp_path, write_config)
    signal_second_rank(process, signal.SIGKILL)
    code, _, err = finish(process, timeout=60)
    assert code != 0 and "Signal 9 (SIGKILL)" in err


def test_torchrun_starts_again_by_itself(tmp_path, write_config):
    path, run = write_config(tmp_path, **TOY, save_every=1), tmp_path / "run"
    process = torchrun(2, [path, "resume=auto"], tmp_path, "--max-restarts=1")
    wait_until((run / "checkpoint_2").exists, process)
    signal_second_rank(process, signal.SIGKILL)
    code, out, _ = finish(process)
    assert code == 0 and "going on from" in out
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 5]


RESTARTED = """
import os, sys, time
sys.path[:0] = ["{root}"]
import distributed, files
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if again and os.environ["RANK"] == "0":
    time.sleep(2)  # so that the other one looks for its address before it is there
rank, _ = distributed.init()
assert distributed.all_reduce_sum(1) == 2
if not again:
    distributed.barrier()
    files.leave_process(rank)  # the second one fails
print("met again", flush=True)
distributed.destroy()
files.leave_process(0)
"""


def test_ranks_that_start_again_find_one_another(tmp_path):
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("met again") == 2, done.stderr


def test_a_wrong_setting_is_said_once(tmp_path, write_config):
    code, _, err = finish(torchrun(2, [write_config(tmp_path), "batch_size=3"], tmp_path))
    assert code != 0 and len(re.findall(r"^error: batch_size", err, re.M)) == 1


def test_an_error_of_one_rank(tmp_path, write_config, world):
    """A video that only the second rank reads: the job ends with its name, said once."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in world.iterdir():
        (videos / path.name).write_bytes(path.read_bytes())
    path = write_config(tmp_path, **{**TOY, "batch_size": 2, "videos": str(videos), "eval_limit": 1})
    config = train.load_config(path)
    samples = train.load_split(config, config.train_annotations)[0]
    bad = next(
        s.id for n in range(5) for s in train.batch_of(samples, 2, n, config.seed)[1:] if s.id != "0.y4m"
    )
    (videos / bad).write_bytes(b"no video")
    code, _, err = finish(torchrun(2, [path], tmp_path))
    (message,) = re.findall(r"^error: .*", err, re.M)
    assert code != 0 and message.startswith(
        f"error: {videos}/{bad}: 8 bytes that cannot be opened as a video"
    )


def test_weights_that_explode(tmp_path, write_config):
    """Both ranks stop in the same step, with the ids, once, and what they had is kept."""
    path, run = write_config(tmp_path, **{**TOY, "batch_size": 2, "learning_rate": 1e30}), tmp_path / "run"
    code, _, err = finish(torchrun(2, [path], tmp_path))
    assert code != 0
    (message,) = re.findall(r"^error: step 2: loss .*", err, re.M)
    assert (run / "checkpoint_1/state/progress.json").is_file()
    dumped = [torch.load(run / f"nonfinite_step_2.rank{rank}.pt") for rank in (0, 1)]
    ids = [item["id"] for part in dumped for item in part]
    assert f"The batch was {', '.join(ids)}; it is kept in {run}/nonfinite_step_2.rank*.pt" in message
    config = train.load_config(path)
    samples = train.load_split(config, config.train_annotations)[0]
    assert ids == [sample.id for sample in train.batch_of(samples, 2, 1, config.seed)]
    assert all(len(item["completions"]) == 4 and len(item["frames"]) for part in dumped for item in part)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_reward_that_fails(tmp_path, write_config, eval_every):
    """At the sixth answer that parses of one of two ranks, in a step, or at the fifth, in an evaluation: both
    stop there, with the answer, once, and what they had is kept."""
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def f(answer, truth):\n"
        "    f.calls = getattr(f, 'calls', 0) + 1\n"
        f"    return 1 / (f.calls < {6 - eval_every} or os.environ['RANK'] != '1')\n"
    )
    settings = {**TOY, "batch_size": 2, "eval_limit": 2, "eval_every": eval_every}
    path, run = write_config(tmp_path, **settings, rewards={f"{tmp_path}/mine.py:f": 1}), tmp_path / "run"
    code, _, err = finish(torchrun(2, [path], tmp_path))
    assert code != 0
    where = r"'\d\.y4m'" if eval_every else "step 2"
    (message,) = re.findall(rf"^error: {where}: .*mine\.py:f raised ZeroDivisionError.*", err, re.M)
    assert "(line 4); the answer was '<time>" in message
    assert (run / "checkpoint_1/state/progress.json").is_file()
    if not eval_every:
        assert f"{run}/nonfinite_step_2.rank*.pt" in message and (run / "nonfinite_step_2.rank1.pt").is_file()


# ----------------------------------------------------------------------------------------------------------
# Killed, and going on


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, write_config):
    """The short version of `python tests/kill.py`."""
    from kill import differences

    config = write_config(tmp_path, **TOY, save_every=1, eval_every=3, eval_batch=2, keep=1)
    assert differences(config, tmp_path, ranks=2, moments=["step", "save"], seed=0) == []
