"""Kill a run with signal 9 again and again, resume it each time, and compare it with one left alone.

    python tests/kill.py                      twelve kills of a run on two ranks; minutes
    python tests/kill.py --ranks 1 --kills 4 --seed 1

The moments are drawn at random: anywhere in a step (sampling, backward, the optimiser's step), while a
checkpoint is written, in an evaluation, in the first seconds; what dies is one rank, or all. In the end
weights, logs (but for the seconds), rollouts and held-out answers must be equal to the last bit.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_runs import BYTES, metrics_of

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "steps=24 batch_size=4 eval_batch=4 save_every=1 eval_every=6 eval_limit=32 keep_checkpoints=3"
MOMENTS = ("start", "step", "save", "evaluation", "step", "save")


def start(ranks: int, folder: Path, name: str) -> subprocess.Popen:
    """A run, new or resumed, in a process group of its own."""
    command = [sys.executable, "train.py", "configs/toy.yaml", *SETTINGS.split(), "resume=auto"]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    files = {"train_annotations": "train.json", "eval_annotations": "test.json", "videos": ""}
    command += [f"{key}={folder / 'world' / file}" for key, file in files.items()]
    command += [f"output_dir={folder / name}"]
    with open(folder / f"{name}.log", "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen, folder: Path, name: str) -> None:
    if process.wait():
        sys.exit(f"error: the run failed:\n{(folder / f'{name}.log').read_text()[-2000:]}")


def wait_for(moment: str, run: Path, process: subprocess.Popen, rng: random.Random) -> None:
    """Until the moment to kill has come, or the run has ended."""
    lines = count_lines(run)
    while process.poll() is None:
        if moment == "save" and any(run.glob("checkpoint*.tmp/*")):
            return time.sleep(rng.uniform(0, 0.02))
        if moment == "evaluation" and any(run.glob("predictions*.rank*.jsonl")):
            return None
        if moment == "step" and count_lines(run) > lines:
            return time.sleep(rng.uniform(0, 1.5))  # a step takes about a second
        if moment == "start":
            return time.sleep(rng.uniform(2, 6))
        time.sleep(0.001)


def count_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(process: subprocess.Popen, rng: random.Random) -> str:
    """Kill one rank, or all processes, with signal 9. Returns what was killed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    if len(ranks) > 1 and rng.random() < 0.5:
        victim = rng.randrange(len(ranks))
        os.kill(ranks[victim], signal.SIGKILL)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            sys.exit("error: the job hangs, two minutes after a rank was killed")
        return f"rank {victim}"
    for pid in [*ranks, process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return "all"


def outcome(run: Path) -> dict[str, object]:
    """All that must be equal: file name -> content."""
    files = {name: (run / name).read_bytes() for name in (*BYTES, "checkpoint/model.safetensors")}
    return {"metrics.jsonl": metrics_of(run), **files}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=raw, description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    moments = [MOMENTS[n % len(MOMENTS)] for n in range(options.kills)]
    rng.shuffle(moments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(start(options.ranks, folder, "whole"), folder, "whole")
        for moment in moments:
            process = start(options.ranks, folder, "killed")
            wait_for(moment, folder / "killed", process, rng)
            what = "nothing: it had ended" if process.poll() is not None else kill(process, rng)
            kept = ", ".join(sorted(path.name for path in (folder / "killed").glob("checkpoint*")))
            print(f"{moment:10} killed {what}; {count_lines(folder / 'killed')} lines; {kept}", flush=True)
        finish(start(options.ranks, folder, "killed"), folder, "killed")
        left, right = outcome(folder / "whole"), outcome(folder / "killed")
    different = [name for name in left if left[name] != right[name]]
    if different:
        sys.exit(f"error: not the same: {', '.join(different)}")
    print(f"{options.kills} kills, {options.ranks} rank(s): the same weights, logs and answers, bit for bit")


if __name__ == "__main__":
    main()
