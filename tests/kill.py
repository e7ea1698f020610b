"""Kill a run with signal 9 again and again, let it go on each time, and compare it with one left alone.

    python tests/kill.py                      twelve kills of a run on two ranks; minutes
    python tests/kill.py --ranks 1 --kills 4 --seed 1

The moments are drawn at random: anywhere in a step (sampling, backward, the optimiser's step), while a
checkpoint is written, in an evaluation, in the first seconds; what dies is one rank, or all. In the end
weights, logs (but for the seconds), rollouts and held-out answers must be equal to the last bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("seconds", "tokens_per_second", "peak_memory")  # of metrics.jsonl: never twice the same


def start(ranks: int, config: str, output_dir: Path) -> subprocess.Popen:
    """A run, new or gone on with, in a process group of its own."""
    command = [sys.executable, str(ROOT / "train.py")]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [config, f"output_dir={output_dir}", "resume=auto"]
    log = open(f"{output_dir}.log", "ab")  # noqa: SIM115 (the process has it)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks: the children of torchrun, or the process itself."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    trainers = [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return trainers or [process.pid]


def kill(process: subprocess.Popen, rng: random.Random) -> str:
    """Kill one rank, or all processes, with signal 9. Returns what was killed."""
    ranks = ranks_of(process)
    if len(ranks) > 1 and rng.random() < 0.5:
        victim = rng.randrange(len(ranks))
        os.kill(ranks[victim], signal.SIGKILL)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            sys.exit("error: the job hangs, a minute after a rank was killed")
        return f"rank {victim}"
    for pid in [*ranks, process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return "all"


def wait_for(moment: str, run: Path, process: subprocess.Popen, rng: random.Random) -> None:
    """Until the moment to kill has come, or the run has ended."""
    lines = count_lines(run / "metrics.jsonl")
    while process.poll() is None:
        if moment == "save" and any(run.glob("checkpoint*.tmp/*")):
            time.sleep(rng.uniform(0, 0.02))
            return
        if moment == "evaluation" and any(run.glob("predictions*.rank*.jsonl")):
            return
        if moment == "step" and count_lines(run / "metrics.jsonl") > lines:
            time.sleep(rng.uniform(0, 1.5))  # a step takes about a second
            return
        if moment == "start":
            time.sleep(rng.uniform(2, 6))
            return
        time.sleep(0.001)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outcome(run: Path) -> dict[str, object]:
    """All that must be equal: file name -> content."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = {"metrics": [{k: v for k, v in line.items() if k not in TIMED} for line in metrics]}
    names = [
        "rollouts.jsonl",
        "predictions_before.jsonl",
        "predictions.jsonl",
        "checkpoint/model.safetensors",
    ]
    return files | {name: (run / name).read_bytes() for name in names}


def differences(config: str, folder: Path, ranks: int, moments: list[str], seed: int) -> list[str]:
    """Run a configuration twice, in folder/whole and folder/killed, the second one killed at these moments,
    and name what differs between the two."""
    rng = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    if start(ranks, config, whole).wait():
        sys.exit(f"error: the run that is left alone failed:\n{Path(f'{whole}.log').read_text()[-2000:]}")
    for moment in moments:
        process = start(ranks, config, killed)
        wait_for(moment, killed, process, rng)
        ended = process.poll() is not None
        what = "nothing: it had ended" if ended else kill(process, rng)
        metrics = count_lines(killed / "metrics.jsonl")
        kept = sorted(path.name for path in killed.glob("checkpoint*"))
        print(f"{moment:10} killed {what}; {metrics} lines logged; {', '.join(kept)}", flush=True)
    if start(ranks, config, killed).wait():
        sys.exit(f"error: it did not go on:\n{Path(f'{killed}.log').read_text()[-2000:]}")
    left, right = outcome(whole), outcome(killed)
    return [name for name in left if left[name] != right[name]]


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    kinds = ["start", "step", "save", "evaluation", "step", "save"]
    moments = [kinds[n % len(kinds)] for n in range(options.kills)]
    rng.shuffle(moments)
    folder = Path(tempfile.mkdtemp())
    try:
        world = f"{folder}/world"
        settings = ROOT / "configs/toy.yaml"
        text = (
            settings.read_text().replace("toy_world", world).replace("checkpoints/", f"{ROOT}/checkpoints/")
        )
        text = text.replace("steps: 80", "steps: 24").replace("batch_size: 16", "batch_size: 4", 1)
        text = text.replace("eval_batch: 64", "eval_batch: 4")
        text += "save_every: 1\neval_every: 6\neval_limit: 32\nkeep: 3\n"
        config = folder / "toy.yaml"
        config.write_text(text)
        found = differences(str(config), folder, options.ranks, moments, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        sys.exit(f"error: not the same: {', '.join(found)}")
    print(
        f"{options.kills} kills, {options.ranks} rank(s): the same weights, logs and answers, to the last bit"
    )


if __name__ == "__main__":
    main()
