"""Train every row of the paper's Tables 5-8, with several seeds each, and print the tables (tables.py).

    python ablate.py                                    the embedded default: configs/toy.yaml, seeds 0 1 2
    python ablate.py --rows rft rft_think --seeds 0     some rows, one seed
    python ablate.py configs/hcstvg_v1.yaml save_every=10 --seeds 0 --nproc 8    on eight GPUs, run after run

Everything goes to a folder (--output, runs/ablations):

    base.yaml     the settings, over which each row of configs/ablations/ is laid
    ROW_seedS/    a run of train.py, with the answers of its controls
    logs/         what they printed

Runs are processes of their own. Started again, it goes on: a finished run stays, another continues from its
last checkpoint (save_every). A run that fails is reported, and the others go on. After training, the whole
method is asked again about grey, shuffled and other videos (controls.py).
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from config import Config, ConfigError, load_config, save_config
from controls import CONTROLS
from data import load_samples
from evaluate import score_predictions
from files import UserError, read_jsonl, run_script
from marks import FREE
from metrics import COLUMNS, Row
from tables import PAPER, ROWS, Run, average, format_tables, markdown, read_runs

ROOT = Path(__file__).parent
OWN = ("seed", "output_dir")  # settings that each run gets here
WHOLE = "rft_think"  # the row whose runs are asked about other videos


@dataclass(frozen=True)
class Task:
    """A process."""

    name: str
    command: list[str]
    log: Path  # what it prints
    result: Path  # a file that is there once it is done


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.is_available()
    parser.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="as of train.py")
    rows = f"of {', '.join(PAPER)}; default: all"
    parser.add_argument("--rows", nargs="+", choices=PAPER, default=list(PAPER), metavar="ROW", help=rows)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=1 if gpus else 2, help="runs at a time (CPU: 2, GPU: 1)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a run, one for each GPU")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/ablations"),
        metavar="FOLDER",
        help="default: runs/ablations",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1 or options.nproc < 1:
        parser.error("--jobs and --nproc are at least 1")
    if gpus and options.jobs > 1:
        parser.error("--jobs: one run at a time on GPUs; for more start it again with CUDA_VISIBLE_DEVICES")

    started, output = time.time(), options.output
    base = prepare(options.words, output)
    rows, seeds = dict.fromkeys(options.rows), dict.fromkeys(options.seeds)
    trainings = [training(row, seed, base, options.nproc) for seed in seeds for row in rows]
    failures = run_tasks(trainings, options.jobs, "train")
    runs = read_runs([task.result.parent for task in trainings if task.result.exists()])
    whole = [run for run in runs if run.row == WHOLE]
    asked = [asking(run.folder, control, options.nproc) for run in whole for control in CONTROLS]
    failures += run_tasks(asked, options.jobs, "control")

    print(format_tables(runs))
    if whole:
        print(f"\n{format_controls(whole)}")
    print(f"\n{len(runs)} of {len(trainings)} runs are in {output}/; this took {time.time() - started:.0f} s")
    if failures:
        raise UserError(f"{len(failures)} failed, see above; started again, it goes on with them")


# ----------------------------------------------------------------------------------------------------------
# What is to be done


def prepare(words: list[str], output: Path) -> Path:
    """Write the settings beneath the rows to base.yaml: given on the command line of train.py they would lie
    above them. Raises ConfigError for a setting that cannot be used, and where the folder holds runs with
    others."""
    settings = [word for word in words if "=" in word]
    for word in settings:
        if word.partition("=")[0] in OWN:
            raise ConfigError(f"{word}: ablate.py sets it for each run; write --seeds or --output")
    files = [word for word in words if "=" not in word] or [str(ROOT / "configs/toy.yaml")]
    config, base = load_config(files, settings), output / "base.yaml"
    if base.exists() and any(output.glob("*_seed*/config.yaml")):
        before, now = (fixed(c) for c in (load_config(base), config))
        changed = [f"{key}: {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{output} holds runs with other settings ({'; '.join(changed)}); choose another --output"
            )
    (output / "logs").mkdir(parents=True, exist_ok=True)
    save_config(config, base)
    if config.toy:
        toy.make_world(config.videos)  # now, and not in two runs at the same time
    return base


def fixed(config: Config) -> dict:
    """The settings that runs of one folder share: all that decides what is learned, from what, and scored."""
    free = {*FREE, *OWN} - {"model", "steps", "train_annotations", "eval_annotations"}
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in free}


def training(row: str, seed: int, base: Path, nproc: int) -> Task:
    """One run of train.py."""
    file, run = ROWS / f"{row}.yaml", base.parent / f"{row}_seed{seed}"
    config = load_config([base, file])
    command = [*script("train.py", nproc), str(base), str(file), "resume=auto", f"seed={seed}"]
    command.append(f"output_dir={run}")
    if not config.think and Path(config.model).resolve() == toy.CHECKPOINT.resolve():
        command.append(f"model={os.path.relpath(toy.DIRECT)}")  # which has learned to answer so
    return Task(run.name, command, log_of(run.name, base.parent), run / "summary.json")


def asking(run: Path, control: str, nproc: int) -> Task:
    """The run's model, asked about other frames."""
    name = f"{run.name}_{control}"
    command = [*script("evaluate.py", nproc), str(run), "--control", control]
    return Task(name, command, log_of(name, run.parent), control_answers(run, control))


def log_of(name: str, output: Path) -> Path:
    """In a folder of their own, so that FOLDER/*_seed* are the runs."""
    return output / "logs" / f"{name}.log"


def control_answers(run: Path, control: str) -> Path:
    return run / f"predictions_{control}.jsonl"


def script(name: str, nproc: int) -> list[str]:
    """The beginning of a command: on one process plain Python, which ends an error in one line."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [sys.executable, *(torchrun if nproc > 1 else []), str(ROOT / name)]


# ----------------------------------------------------------------------------------------------------------
# Processes


def run_tasks(tasks: list[Task], jobs: int, name: str) -> list[str]:
    """Run those that are not done yet, `jobs` at a time; return what went wrong, which is printed, too.

    An exception in here, such as Ctrl-C, ends the processes: train.py finishes its step and saves, or, after
    another Ctrl-C, is killed.
    """
    waiting = [task for task in tasks if not task.result.exists()]
    running: dict[subprocess.Popen, Task] = {}
    failures = []
    with tqdm(total=len(tasks), initial=len(tasks) - len(waiting), desc=name, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop(0)
                    running[start(task)] = task
                    bar.set_postfix_str(", ".join(task.name for task in running.values()))
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    task = running.pop(process)
                    bar.update()
                    if process.returncode or not task.result.exists():  # stopped by a signal, it returns 0
                        failures.append(f"{task.name} failed: {last_line(task.log)} ({task.log})")
                        bar.write(failures[-1], file=sys.stderr)
        finally:
            end(list(running))
    return failures


def start(task: Task) -> subprocess.Popen:
    """In a session of its own: a terminal's Ctrl-C comes to it once, from `end`, and not twice."""
    with task.log.open("wb") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended by now
                os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
        raise


def last_line(log: Path) -> str:
    """What a log ends with; where torchrun has added its own account, the error before that."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line] or ["it printed nothing"])[-1]


# ----------------------------------------------------------------------------------------------------------
# The controls' table


def format_controls(runs: list[Run]) -> str:
    """Scores of the same models on real and on other videos, as a table in Markdown."""
    shown = {"the videos": [run.scores for run in runs]}
    shown |= {text: control_scores(runs, control) for control, text in CONTROLS.items()}
    lines = [["", "runs", *COLUMNS]]
    for name, scores in shown.items():
        cells = [average([row[column] for row in scores]) for column in COLUMNS]
        lines.append([name, str(len(scores)), *cells])
    return f"Controls: RFT + thinking boxes, asked about other frames\n\n{markdown(lines)}"


def control_scores(runs: list[Run], control: str) -> list[Row]:
    """The scores of the runs that have been asked, protocol native."""
    scores = []
    for run in runs:
        config, answers = run.config, control_answers(run.folder, control)
        if answers.exists():
            data = (config.dataset, config.eval_annotations, config.videos, config.vidor)
            samples = load_samples(*data)[0][: config.eval_limit or None]
            scores.append(score_predictions(read_jsonl(answers, "id"), samples, config)["native"])
    return scores


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends the children, too
    run_script(
        lambda: main(sys.argv[1:]),
        "--output",
        "free some space, or choose another --output",
        "stopped; the same command goes on",
    )
