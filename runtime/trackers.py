"""TensorBoard and Weights & Biases, which show what metrics.jsonl holds (`log_to`). Both are optional.

A tracker is TRACKERS[name](run, config). It takes the numbers of a line of metrics.jsonl, by `phase/name`,
with its step, which is the x axis, and the number of the line; and pictures, which belong to a line.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np

from config import Config, ConfigError
from runtime.files import write_whole


def check_trackers(config: Config) -> None:
    """Raises ConfigError where `log_to` names a package that is not installed."""
    for name in config.log_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb makes folders "wandb", which Python could import, too
            raise ConfigError(f"log_to: {name} is not installed; pip install {name}, or leave it out")


class TensorBoard:
    """Event files in run/tensorboard. `tensorboard --logdir runs` shows them."""

    def __init__(self, run: Path, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        # Hide all of an earlier start: what the run keeps of it follows. Purging from the last step on would
        # hide too much or too little, since each phase counts its own steps. (TensorBoard obeys only where
        # the first start has said it, too.)
        self._writer = SummaryWriter(run / "tensorboard", purge_step=0)

    def numbers(self, numbers: dict[str, float], step: int, line: int) -> None:
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)
        self._writer.flush()  # what waits in its queue would be lost if the run were killed

    def picture(self, tag: str, path: Path, step: int, line: int) -> None:
        from PIL import Image

        self._writer.add_image(tag, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project "stvg-o1" at Weights & Biases, or with WANDB_MODE=offline files in run/wandb.

    Its history can only grow. A row has the number of the line in metrics.jsonl, so that the service's count
    says which lines it has, of whatever phase. Offline each start begins at 0, and writes all: `wandb sync`
    replaces a run by later files of the same id (github.com/wandb/wandb/issues/3841).
    """

    def __init__(self, run: Path, config: Config):
        import wandb

        known = run / "wandb_id"
        same = known.read_text() if known.is_file() else None
        settings = {"project": "stvg-o1", "name": run.resolve().name, "dir": run, "id": same}
        try:
            self._run = wandb.init(**settings, resume="allow", config=dataclasses.asdict(config))
        except wandb.Error as error:  # such as no key, no network
            reason = " ".join(str(error).split())
            raise ConfigError(f"log_to: wandb: {reason}; wandb login, or set WANDB_MODE=offline") from error
        write_whole(known, self._run.id.encode())
        self._first = self._run.starting_step  # what an earlier start has sent stays as it is
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # the x axis

    def numbers(self, numbers: dict[str, float], step: int, line: int) -> None:
        if line >= self._first:
            self._run.log({**numbers, "step": step}, step=line)

    def picture(self, tag: str, path: Path, step: int, line: int) -> None:
        import wandb

        self.numbers({tag: wandb.Image(str(path))}, step, line)  # into the line's row, which is still open

    def close(self) -> None:
        self._run.finish(exit_code=0 if sys.exception() is None else 1)  # in contextlib.closing: the run's


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}
