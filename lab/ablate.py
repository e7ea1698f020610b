"""Train every row of the paper's Tables 5-8, with several seeds each, and print the tables (tables.py).

    python ablate.py                                    the embedded default: configs/toy.yaml, seeds 0 1 2
    python ablate.py --rows rft rft_think --seeds 0     some rows, one seed
    python ablate.py configs/hcstvg_v1.yaml save_every=10 --seeds 0 --nproc 8    on eight GPUs, run after run

Everything goes to a folder (--output, runs/ablations):

    base.yaml     the settings, over which each row of configs/ablations/ is laid
    ROW_seedS/    a run of train.py, with the answers of its controls in predictions_CONTROL.jsonl
    logs/         what they printed

Runs are processes of their own. Started again, it goes on: a finished run stays, another continues from its
last checkpoint (save_every). A run that fails is reported, and the others go on. After training, the whole
method is asked again about grey, shuffled and other videos (controls.py); what is answered already is not
asked again. Settings with which a row would not be the paper's, such as another weight of a reward, are
refused before anything is trained.
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

from config import Config, ConfigError, load_config, save_config
from data import load_samples
from evaluate import score_predictions
from lab.compare import (
    PAPER,
    ROWS,
    Run,
    average,
    compared_settings,
    distinction,
    format_tables,
    known_rows,
    markdown,
    read_runs,
)
from lab.controls import CONTROLS
from metrics import COLUMNS, Row
from runtime.files import DataError, UserError, read_jsonl, run_script
from runtime.fingerprints import MAY_CHANGE
from toy import pretrain
from toy import world as toy_world

ROOT = Path(__file__).parent.parent
OWN = ("seed", "output_dir")  # settings that each run gets here
WHOLE = "rft_think"  # the row whose runs are asked about other videos


@dataclass(frozen=True)
class Task:
    """A process."""

    name: str
    command: list[str]
    log: Path  # what it prints
    result: Path | None  # a file that is there once it is done; None: it finds out by itself what is left


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
    settings = [word for word in arguments if re.match(r"[\w.]+.*=", word)]  # --rows would take them
    options = parser.parse_args([word for word in arguments if word not in settings])
    options.words += settings
    if options.jobs < 1 or options.nproc < 1:
        parser.error("--jobs and --nproc are at least 1")
    if gpus and options.jobs > 1:
        parser.error("--jobs: one run at a time on GPUs; for more start it again with CUDA_VISIBLE_DEVICES")

    started, output = time.time(), options.output
    rows, seeds = dict.fromkeys(options.rows), dict.fromkeys(options.seeds)
    base = prepare(options.words, output, list(rows))
    trainings = [training(row, seed, base, options.nproc) for seed in seeds for row in rows]
    failed = run_tasks(trainings, options.jobs, "train")
    runs = read_runs([output / task.name for task in trainings if task not in failed])
    whole = [run for run in runs if run.row == WHOLE]
    pairs = [(run, control) for run in whole for control in CONTROLS]
    askings = [asking(run.folder, control, options.nproc) for run, control in pairs]
    failed += run_tasks(askings, options.jobs, "control")
    answered = [pair for pair, task in zip(pairs, askings, strict=True) if task not in failed]

    print(format_tables(runs))
    if whole:
        print(f"\n{format_controls(whole, answered)}")
    print(f"\n{len(runs)} of {len(trainings)} runs are in {output}/; this took {time.time() - started:.0f} s")
    if failed:
        raise UserError(f"{len(failed)} failed, see above; started again, it goes on with them")


# ----------------------------------------------------------------------------------------------------------
# What is to be done


def prepare(words: list[str], output: Path, rows: list[str]) -> Path:
    """Write the settings beneath the rows to base.yaml: given on the command line of train.py they would lie
    above them. Raises ConfigError for a setting that cannot be used, where the folder holds runs with others,
    and as check_rows does."""
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
    check_rows(base, rows)
    if config.toy:
        toy_world.make_world(config.videos)  # now, and not in two runs at the same time
    return base


def check_rows(base: Path, rows: list[str]) -> None:
    """Raises ConfigError, which names the settings that are to blame, unless each row laid over base.yaml is
    still that row: what is trained would stand in no table, or in another's place."""
    known, spoilt = known_rows(), {}  # spoilt: a setting -> the rows that it changes
    for row in rows:
        config = load_config([base, ROWS / f"{row}.yaml"])
        ours, theirs = distinction(config), known[row]
        keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if keys:  # the first: without steps, for one, no reward counts
            setting = f"{keys[0]}: {compared_settings(config)[keys[0]]}"
            spoilt.setdefault(setting, []).append(row)
    if spoilt:
        blamed = "; ".join(f"{setting} (beneath {', '.join(names)})" for setting, names in spoilt.items())
        raise ConfigError(f"{blamed}: such rows are not the paper's; leave it out, or name other --rows")


def fixed(config: Config) -> dict:
    """The settings that runs of one folder share: all that decides what is learned, from what, and scored."""
    free = {*MAY_CHANGE, *OWN} - {"model", "steps", "train_annotations", "eval_annotations"}
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in free}


def training(row: str, seed: int, base: Path, nproc: int) -> Task:
    """One run of train.py."""
    file, run = ROWS / f"{row}.yaml", base.parent / f"{row}_seed{seed}"
    config = load_config([base, file])
    command = [*script("train.py", nproc), str(base), str(file), "resume=auto", f"seed={seed}"]
    command.append(f"output_dir={run}")
    if not config.think and Path(config.model).resolve() == pretrain.CHECKPOINT.resolve():
        command.append(f"model={os.path.relpath(pretrain.DIRECT)}")  # which has learned to answer so
    return Task(run.name, command, log_of(run.name, base.parent), run / "summary.json")


def asking(run: Path, control: str, nproc: int) -> Task:
    """The run's model, asked about other frames where it has not been yet; an error where the file for the
    answers holds some that were made in another way."""
    name, output = f"{run.name}_{control}", str(control_answers(run, control))
    command = [*script("evaluate.py", nproc), str(run), "--control", control, "--output", output]
    return Task(name, command, log_of(name, run.parent), None)


def log_of(name: str, output: Path) -> Path:
    """In a folder of their own, so that FOLDER/*_seed* are the runs."""
    return output / "logs" / f"{name}.log"


def control_answers(run: Path, control: str) -> Path:
    return run / f"predictions_{control}.jsonl"


def script(name: str, nproc: int) -> list[str]:
    """The beginning of a command: on one process plain Python, which ends an error in one line."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    torchrun.append("--shutdown-timeout=600")  # seconds to finish a step and save; without it they are 30
    return [sys.executable, *(torchrun if nproc > 1 else []), str(ROOT / name)]


# ----------------------------------------------------------------------------------------------------------
# Processes


def run_tasks(tasks: list[Task], jobs: int, name: str) -> list[Task]:
    """Run those that are not done yet, `jobs` at a time; return those that failed, of which is printed why.

    An exception in here, such as Ctrl-C, ends the processes: train.py finishes its step and saves, or, after
    another Ctrl-C, is killed with all that it has started.
    """
    waiting = [task for task in tasks if not (task.result and task.result.exists())]
    running: dict[subprocess.Popen, Task] = {}
    failed = []
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
                    stopped = task.result and not task.result.exists()  # by a signal; it returns 0
                    if process.returncode or stopped:
                        failed.append(task)
                        bar.write(f"{task.name} failed: {last_line(task.log)} ({task.log})", file=sys.stderr)
        finally:
            end(list(running))
    return failed


def start(task: Task) -> subprocess.Popen:
    """In a session of its own: a terminal's Ctrl-C comes to it once, from `end`, and not twice."""
    with task.log.open("wb") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def end(processes: list[subprocess.Popen]) -> None:
    """Ask them to end, and wait for that; on Ctrl-C kill them, and all that they have started."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in [process for process in processes if process.poll() is None]:
            started = descendants(process.pid)  # before they are orphans
            process.kill()
            for number in started:
                with contextlib.suppress(ProcessLookupError):  # it has ended by now
                    os.kill(number, signal.SIGKILL)
        raise


def descendants(process: int) -> list[int]:
    """The numbers of all processes that it has started, those that they have started, and so on; on a system
    without /proc none. torchrun's ranks are in sessions of their own, so that no signal to a group of
    processes reaches them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended by now
            _, _, after_name = path.read_bytes().rpartition(b")")  # a name may have spaces and brackets
            children.setdefault(int(after_name.split()[1]), []).append(int(path.parent.name))
    found = [process]
    for number in found:  # which grows
        found += children.get(number, [])
    return found[1:]


def last_line(log: Path) -> str:
    """What a log ends with; where torchrun has added its own account, the error before that."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line] or ["it printed nothing"])[-1]


# ----------------------------------------------------------------------------------------------------------
# The controls' table


def format_controls(runs: list[Run], answered: list[tuple[Run, str]]) -> str:
    """Scores of the same models on real and on other videos, as a table in Markdown. answered: which of the
    runs have answered which control."""
    shown = {"the videos": [run.scores for run in runs]}
    for control, text in CONTROLS.items():
        shown[text] = [control_scores(run, control) for run, asked in answered if asked == control]
    lines = [["", "runs", *COLUMNS]]
    for name, scores in shown.items():
        cells = [average([row[column] for row in scores]) for column in COLUMNS]
        lines.append([name, str(len(scores)), *cells])
    return f"Controls: RFT + thinking boxes, asked about other frames\n\n{markdown(lines)}"


def control_scores(run: Run, control: str) -> Row:
    """The scores of a run's answers about other frames, protocol native. Raises DataError where a sentence of
    the held-out split has none, which would count as a failure."""
    config, path = run.config, control_answers(run.folder, control)
    data = (config.dataset, config.eval_annotations, config.videos, config.vidor)
    samples = load_samples(*data)[0][: config.eval_limit or None]
    answers = {answer["id"]: answer for answer in read_jsonl(path, "id")}  # maybe beyond eval_limit, too
    missing = [sample.id for sample in samples if sample.id not in answers]
    if missing:
        raise DataError(f"{path}: {len(missing)} sentences have no answer; start ablate.py again")
    return score_predictions([answers[sample.id] for sample in samples], samples, config)["native"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends the children, too
    run_script(
        lambda: main(sys.argv[1:]),
        "--output",
        "free some space, or choose another --output",
        "stopped; the same command goes on",
    )
