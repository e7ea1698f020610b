"""Train every row of the paper's Tables 5-8, and print the tables.

    python -m lab.ablate                                    the toy: nine rows, seeds 0 1 2
    python -m lab.ablate --rows rft rft_think --seeds 0     some rows, one seed
    python -m lab.ablate configs/hcstvg_v1.yaml save_every=10 --seeds 0 --nproc 8     eight GPUs

A row is a file of configs/ablations/, laid over your configuration and your key=value settings (together in
OUTPUT/base.yaml). Its run is OUTPUT/ROW_seedS; what the run prints goes to OUTPUT/logs/ROW_seedS.log. The
same command again skips finished runs and resumes the others from their last checkpoint (save_every).
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from config import ConfigError, load_config, save_config
from lab.tables import PAPER, ROWS, Run, check_comparable, format_tables, read_run, row_of
from runtime.files import UserError, run_script
from toy.world import make_world

ROOT = Path(__file__).parent.parent
TOY, TOY_DIRECT = "checkpoints/toy", "checkpoints/toy_direct"  # the latter answers without thinking boxes


def main(arguments: list[str]) -> None:
    """Raises ConfigError or DataError before anything is trained, UserError at the end if runs failed."""
    parser = argparse.ArgumentParser(
        "python -m lab.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs, rows = 1 if torch.cuda.is_available() else 2, f"default: all of {', '.join(PAPER)}"
    parser.add_argument("configs", nargs="*", metavar="CONFIG | key=value", help="as of train.py")
    parser.add_argument("--rows", nargs="+", choices=PAPER, default=list(PAPER), metavar="ROW", help=rows)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; default: 2, on a GPU 1")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a run, one for each GPU")
    parser.add_argument("--output", type=Path, default="runs/ablations", help="default: runs/ablations")
    settings = [word for word in arguments if "=" in word and word[0] != "-"]  # --rows would take them
    options = parser.parse_args([word for word in arguments if word not in settings])

    base = load_config(options.configs or [ROOT / "configs/toy.yaml"], settings)
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    save_config(base, options.output / "base.yaml")
    if base.toy:
        make_world(base.videos)  # before two runs make it at the same time
    plans = [plan(row, seed, options.output, options.nproc) for seed in options.seeds for row in options.rows]
    check_comparable([read_run(run.folder) if finished(run.folder) else run for run, _ in plans])
    train({run.folder: command for run, command in plans if not finished(run.folder)}, options.jobs)
    done = [read_run(run.folder) for run, _ in plans if finished(run.folder)]
    if done:
        print(format_tables(done))
    if failed := len(plans) - len(done):
        raise UserError(f"{failed} of {len(plans)} runs failed; the same command resumes them")


def finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def plan(row: str, seed: int, output: Path, nproc: int) -> tuple[Run, list[str]]:
    """The run as it will be, without scores, and its command. Raises ConfigError."""
    folder, files = output / f"{row}_seed{seed}", [output / "base.yaml", ROWS / f"{row}.yaml"]
    settings = [f"seed={seed}", f"output_dir={folder}", "resume=auto"]
    config = load_config(files, settings)
    if config.model == TOY and not config.think:
        settings.append(f"model={TOY_DIRECT}")
    if row_of(config) != row:
        raise ConfigError(f"{row}: your settings make it another row; leave them out, or name other --rows")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    torchrun.append("--shutdown-timeout=600")  # seconds to finish a step and save
    launcher = [sys.executable, *(torchrun if nproc > 1 else []), str(ROOT / "train.py")]
    return Run(folder, load_config(files, settings), row, {}), [*launcher, *map(str, files), *settings]


def train(commands: dict[Path, list[str]], jobs: int) -> None:
    """Run the commands, `jobs` at a time, and report how each ends. commands: by the folder of the run.

    Ctrl-C, or another exception in here, asks the runs to end; each finishes its step and saves first.
    """
    waiting, running = list(commands), {}
    logs = {folder: folder.parent / f"logs/{folder.name}.log" for folder in commands}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                with logs[folder].open("wb") as log:  # a session of its own: one signal, not two, on Ctrl-C
                    streams = {"stdout": log, "stderr": log, "start_new_session": True}
                    running[folder] = subprocess.Popen(commands[folder], **streams)
            time.sleep(0.1)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                del running[folder]
                how = "finished" if finished(folder) else f"FAILED, see {logs[folder]}"
                left = len(waiting) + len(running)
                print(f"{folder.name}: {how}; {left} of {len(commands)} left", file=sys.stderr)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends the runs, too
    stopped = "stopped; the same command resumes"
    run_script(lambda: main(sys.argv[1:]), "--output", stopped)
