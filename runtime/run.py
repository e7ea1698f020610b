"""A run of train.py: its folder, its steps, its checkpoints, its end. Nothing here is about the method."""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import decord
import numpy as np
import torch
import transformers
from tqdm import tqdm

from config import Config, ConfigError, load_config, save_config
from runtime import checkpoints, distributed
from runtime.checkpoints import Checkpoint, Progress
from runtime.files import leftovers, read_jsonl, write_json, write_jsonl, write_whole
from runtime.fingerprints import fingerprints, settings_of
from runtime.logs import (
    DRIFT_STEPS,
    WARNINGS,
    Log,
    before_report,
    check_trackers,
    clock,
    count_warnings,
    drifts_apart,
    parse_report,
    peak_memory,
    summarize,
    warning_of,
)
from runtime.plugins import load_plugins, plugin_fingerprints
from samples import Sample
from video.frames import VideoError
from video.loader import FrameLoader

WATCHES = 5  # times that a run samples answers to the same sentences
WRITTEN = ("config.yaml", "versions.json", "summary.json", "wandb_id", "predictions*.jsonl")  # as a whole


class Stopped(Exception):
    """A signal asked the run to end, and all ranks agree."""


@dataclass
class Run:
    config: Config
    folder: Path  # output_dir
    policy: object
    loader: FrameLoader
    fingerprints: dict  # of weights, data and settings: a resumed run must have the same
    checkpoint: Path | None  # resumed from it
    progress: Progress
    stop: distributed.Stop
    log: Log | None  # of rank 0
    started: float  # by time.monotonic; the starts before count as if they had ended then
    optimizer: torch.optim.Optimizer | None = None  # of the phase that is running
    batch: list[Sample] = field(default_factory=list)  # of the step that is running, on all ranks
    recent: list[dict] = field(default_factory=list)  # lines of metrics.jsonl of the last steps
    said: dict[str, float] = field(default_factory=dict)  # warning -> how bad it was when it was said
    evaluated: int = 0  # step of the last evaluation
    watch: Callable[[], list[dict]] = list  # samples the answers of watched.jsonl; on all ranks

    def steps(
        self,
        phase: str,
        config: Config,
        samples: list[Sample],
        optimizer: torch.optim.Optimizer,
        evaluate: Callable[[str], object],
    ) -> Iterator[tuple[int, list[tuple[int, Sample]]]]:
        """Yield (step, batch) for the steps of a phase ("sft" or "grpo") that are left.

        batch: this rank's [(k, sample)], k being the sample's place in the global batch; the videos of the
        next one are read ahead. Between steps: evaluate every eval_every steps, save every save_every, watch
        WATCHES times in reinforcement learning, and raise Stopped after a signal. At the end: save.
        """
        done = self.progress.sft_step if phase == "sft" else self.progress.step
        last = f"checkpoint_sft_{config.steps}" if phase == "sft" else "checkpoint"
        self.optimizer = optimizer
        batch_of = functools.partial(global_batch, samples, config.batch_size, seed=config.seed)
        with tqdm(total=config.steps, initial=done, desc=phase.upper(), disable=not self.log) as self.bar:
            for step in range(done, config.steps):
                self.batch = []
                due = phase == "grpo" and step and config.eval_every and step % config.eval_every == 0
                if due and self.evaluated != step:
                    evaluate("step")
                self._watch(phase, step)
                clock.lap()
                self.batch = batch_of(step)
                batch = local_part(self.batch)
                self.loader.prefetch([sample for _, sample in batch + local_part(batch_of(step + 1))])
                yield step, batch
                counter = {"sft_step" if phase == "sft" else "step": step + 1}
                self.progress = dataclasses.replace(self.progress, **counter)
                self.bar.update()
                if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    self.save()
                if self.stop.agreed():
                    raise Stopped
        if done < config.steps or self.checkpoint != self.folder / last:
            self._watch(phase, config.steps)
            self.save(last)
        self.optimizer = None

    def _watch(self, phase: str, step: int) -> None:
        """Append answers to watched.jsonl if it is time, at the start, at the end and evenly between, unless
        this step's are there: a finished run may go on to more steps."""
        path = self.folder / "watched.jsonl"
        times = {round(k * self.config.steps / (WATCHES - 1)) for k in range(WATCHES)}
        if phase == "sft" or step not in times:
            return
        if distributed.on_rank0(
            lambda: not path.exists() or step not in {x["step"] for x in read_jsonl(path)}
        ):
            records = [{"step": step, **record} for record in self.watch()]
            if self.log:
                write_jsonl(records, path, append=True)

    def nothing_to_learn(self, step: int, prompts: list) -> bool:
        """Whether no rank could read a video of this batch (on_bad_video: skip), which is said once. Raises
        VideoError in the first step, where `videos` is probably the wrong folder."""
        if distributed.all_reduce_sum(len(prompts)):
            return False
        what = f"none of the {len(self.batch)} videos of step {step + 1} can be read: {self.batch[0].video}"
        if step == 0:
            raise VideoError(f"{what}; is `videos` the right folder?")
        self.loader.say_once(f"skipped: {what}")
        return True

    def log_sft(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl. metrics: of train.update."""
        cost = step_cost(metrics["tokens"])
        metrics = {"loss": metrics["nll"], "grad_norm": metrics["grad_norm"], **cost}
        if self.log:
            self.log.write({"phase": "sft", "step": step + 1, **metrics})

    def log_grpo(self, step: int, metrics: dict, records: list[dict], diagnostics: list[dict]) -> None:
        """Write one line of metrics.jsonl, and the answers of all ranks to rollouts.jsonl. records: of this
        rank's answers; diagnostics: rewards.Score.diagnostics of each."""
        with clock("wait"):
            records, diagnostics = map(distributed.all_gather_list, (records, diagnostics))
        metrics = summarize(records, diagnostics, self.config.num_generations) | metrics
        metrics |= step_cost(metrics.pop("tokens"))
        if not self.log:
            return
        self.recent = [*self.recent, metrics][-DRIFT_STEPS:]
        metrics["drift"] = float(drifts_apart(self.recent))
        warning, share = warning_of(metrics, self.recent)
        if warning:
            metrics["warning"] = warning
            self._warn(warning, share, step, records)
        write_jsonl(records, self.folder / "rollouts.jsonl", append=True)
        self.log.write({"phase": "grpo", "step": step + 1, **metrics})
        reward, viou = (np.mean([line[key] for line in self.recent[-10:]]) for key in ("reward", "viou_pred"))
        loud = f" ({warning}!)" if warning else ""
        self.bar.set_postfix_str(f"reward {reward:z.2f}, vIoU {viou:.2f}{loud}", refresh=False)

    def _warn(self, warning: str, share: float, step: int, records: list[dict]) -> None:
        """Say a warning once, and again only when it has become worse."""
        if share > self.said.get(warning, -1) + 0.2:
            self.said[warning] = share
            about = f". {parse_report(records, self.config)}" if warning in ("cut off", "unreadable") else ""
            tqdm.write(f"warning, step {step + 1}: {WARNINGS[warning]}{about}", file=sys.stderr)

    def log_eval(self, scores: dict, when: str, predictions: list[dict]) -> None:
        """Write the held-out scores to metrics.jsonl; keep the weights as best_STEP if they are the best.
        Before training, say how many answers parse."""
        if self.log and when == "before":
            print(before_report(predictions, self.config), file=sys.stderr)
        if self.log:
            self.log.write({"phase": "eval", "step": self.progress.step, **scores})
        self.evaluated = self.progress.step
        best = self.progress.best["m_vIoU"] if self.progress.best else -1
        if when != "before" and self.config.eval_every and scores["m_vIoU"] > best:
            best = {"step": self.progress.step, "m_vIoU": scores["m_vIoU"]}
            self.progress = dataclasses.replace(self.progress, best=best)
            checkpoints.replace_best(self.folder, self.policy, self.progress.step)
            if when == "after":
                checkpoints.note_best(self.folder / "checkpoint", best)

    @property
    def sft_checkpoint(self) -> Path:
        """The weights after supervised fine-tuning, which are the reference of what follows."""
        return self.folder / f"checkpoint_sft_{self.config.sft.steps}"

    def restore(self, phase: str, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimizer from the checkpoint of this phase that the run resumes from, if any."""
        if self.checkpoint and (phase == "sft" or self.progress.step):
            checkpoints.load(self.checkpoint, self.policy.model, optimizer)

    def save(self, name: str = "") -> None:
        """Write a checkpoint of this moment, and remove older ones (keep_checkpoints)."""
        sft, step = self.progress.sft_step, self.progress.step
        self.progress = dataclasses.replace(self.progress, seconds=time.monotonic() - self.started)
        name = name or (f"checkpoint_{step}" if step else f"checkpoint_sft_{sft}")
        checkpoints.save(self.folder / name, self.policy, self.optimizer, self.progress, self.fingerprints)
        checkpoints.prune(self.folder, self.config.keep_checkpoints, spare=[self.sft_checkpoint])

    def write_summary(self) -> dict:
        """Write summary.json: scores before and after, the mean reward of the first and last tenth of the
        steps (None without steps), the warnings that held to the end or in half of the steps, and the
        seconds of all starts, each up to its checkpoint. Returns it."""
        lines = read_jsonl(self.folder / "metrics.jsonl")
        first, *_, last = [m for m in lines if m["phase"] == "eval"]
        before, after = ({key: m[key] for key in last if key not in ("phase", "step")} for m in (first, last))
        grpo = [m for m in lines if m["phase"] == "grpo"]
        rewards = [m["reward"] for m in grpo]
        tenth = max(1, len(rewards) // 10)  # the mean of a single step is noise
        parts = {"first": rewards[:tenth], "last": rewards[-tenth:]}
        reward = {name: float(np.mean(part)) if part else None for name, part in parts.items()}
        summary = {"before": before, "after": after, "reward": reward}
        summary["warnings"] = count_warnings(grpo)
        summary["seconds"] = time.monotonic() - self.started
        write_json(summary, self.folder / "summary.json")
        return summary

    def progress_text(self) -> str:
        if self.progress.sft_step and not self.progress.step:
            return f"step {self.progress.sft_step} of supervised fine-tuning"
        return f"step {self.progress.step}"


def global_batch(samples: list[Sample], batch_size: int, step: int, seed: int) -> list[Sample]:
    """The samples of an optimiser step: the split in a new order each epoch, epoch after epoch."""
    batch = []
    for n in range(step * batch_size, (step + 1) * batch_size):
        epoch, k = divmod(n, len(samples))
        batch.append(samples[_order(len(samples), seed, epoch)[k]])
    return batch


@functools.cache
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def local_part(batch: list[Sample]) -> list[tuple[int, Sample]]:
    """This rank's part of a batch, each sample with its place in it; in order the parts are the batch."""
    rank, world_size = distributed.init()
    size = len(batch) // world_size
    return list(enumerate(batch))[rank * size : (rank + 1) * size]


def step_cost(tokens: float) -> dict:
    """Seconds by part (mean of the ranks), tokens per second, peak memory. tokens: of this rank's answers."""
    tokens = distributed.all_reduce_sum(tokens)
    laps = distributed.all_gather(clock.lap())
    seconds = {part: float(np.mean([lap[part] for lap in laps])) for part in laps[0]}
    peak = distributed.all_reduce_max(peak_memory())
    return {"tokens_per_second": tokens / seconds["step"], "peak_memory": peak, "seconds": seconds}


@contextlib.contextmanager
def open_run(
    config: Config, policy, loader: FrameLoader, samples: list[Sample], started: float
) -> Iterator[Run]:
    """Create output_dir, or with resume: auto roll it back to its last checkpoint. samples: of both splits.
    started: when this start began, by time.monotonic.

    A signal, and a loss or reward that is not finite, end the run with a checkpoint of the last good weights.
    Raises ConfigError, and changes nothing, where another run stands or works there.
    """
    rank, _ = distributed.init()
    folder, identity, log = Path(config.output_dir), fingerprints(config, samples), None
    with contextlib.ExitStack() as stack:
        checkpoint, progress = _open_folder(config, folder, identity, stack)
        stop = stack.enter_context(distributed.Stop())
        if rank == 0:
            log = stack.enter_context(contextlib.closing(Log(folder, config)))
        started -= progress.seconds
        run = Run(config, folder, policy, loader, identity, checkpoint, progress, stop, log, started)
        if progress.step:
            lines = read_jsonl(folder / "metrics.jsonl")
            run.recent = [m for m in lines if m["phase"] == "grpo"][-DRIFT_STEPS:]
            run.evaluated = max(m["step"] for m in lines if m["phase"] == "eval")
        try:
            yield run
        except (Stopped, FloatingPointError) as error:
            stopped = isinstance(error, Stopped)
            trained = run.optimizer and (run.progress.sft_step or run.progress.step)
            # A second update of the same batch fails with weights that the first one has changed.
            saved = trained and (stopped or config.updates_per_batch == 1)
            if saved:
                run.save()
            if not stopped:
                batch = f". The batch was {', '.join(s.id for s in run.batch)}" if run.batch else ""
                kept = "; the weights from before it are saved, and resume=auto repeats it" if saved else ""
                raise FloatingPointError(f"after {run.progress_text()}: {error}{batch}{kept}") from error
            if rank == 0:
                print(f"stopped after {run.progress_text()}; resume with: the same command and resume=auto")


def _open_folder(
    config: Config, run: Path, identity: dict, stack: contextlib.ExitStack
) -> tuple[Path | None, Progress]:
    """Open output_dir, locked until `stack` closes. Returns the checkpoint to resume, and its progress.

    Rank 0 looks and changes; the others learn what it has found."""
    exists = distributed.on_rank0(lambda: _enter(run, stack))
    found = checkpoints.last_checkpoint(run) if exists and config.resume == "auto" else None
    distributed.on_rank0(lambda: _prepare(config, run, identity, found, stack))
    return (found.tidied, found.progress) if found else (None, Progress())


def _enter(run: Path, stack: contextlib.ExitStack) -> bool:
    """Make output_dir where there is none, lock it, then look: whether it holds a run. Raises ConfigError for
    what is neither a run nor empty."""
    with contextlib.suppress(FileExistsError):
        run.mkdir(parents=True, exist_ok=True)
    if run.is_dir():
        _lock(run, stack)
        if (run / "config.yaml").is_file():
            return True
        if set(run.iterdir()) <= set(leftovers(run, *WRITTEN)):
            return False
    raise ConfigError(f"output_dir: {run} exists and is no run of train.py; choose another")


def _lock(run: Path, stack: contextlib.ExitStack) -> None:
    """Keep other processes out until `stack` closes or this process ends. Raises ConfigError."""
    folder = os.open(run, os.O_RDONLY)
    stack.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output_dir: a run is at work in {run}; wait for it, or choose another") from None


def _prepare(
    config: Config, run: Path, identity: dict, found: Checkpoint | None, stack: contextlib.ExitStack
) -> None:
    """Roll the run back, or move another one aside. Write settings, versions and the files of plug-ins."""
    known, auto, same = run / "config.yaml", config.resume == "auto", bool(found)
    if found:
        checkpoints.refuse_other(found, config, identity)
    elif auto and known.exists():
        same = settings_of(load_config(known)) == identity["settings"]
    if same:
        _roll_back(config, run, found)
    elif known.exists():
        _move_aside(run, stack)
    for path in leftovers(run, *WRITTEN):
        path.unlink()
    save_config(config, known)
    for path in plugin_fingerprints(config.rewards):
        (run / "rewards").mkdir(exist_ok=True)
        write_whole(run / "rewards" / path.strip("/").replace("/", "_"), Path(path).read_bytes())
    packages = {package.__name__: package.__version__ for package in (torch, transformers, decord, np)}
    write_json({"python": platform.python_version(), **packages}, run / "versions.json")
    if auto:
        print(f"resuming from {found.tidied}" if found else f"no checkpoint in {run}: starting at step 0")


def _roll_back(config: Config, run: Path, found: Checkpoint | None) -> None:
    """To the last checkpoint, or to the start where there is none."""
    progress = found.progress if found else Progress()
    checkpoints.cut_back(run, progress)  # which may refuse, too
    checkpoints.tidy(run, found)
    if progress.step < config.steps:  # what an earlier end has left
        (run / "summary.json").unlink(missing_ok=True)
        ended = found and found.tidied.name == "checkpoint"
        if ended and (run / "predictions.jsonl").exists():
            (run / "predictions.jsonl").replace(run / f"predictions_{progress.step}.jsonl")


def _move_aside(run: Path, stack: contextlib.ExitStack) -> None:
    """Rename a folder with an earlier run, and make and lock an empty one in its place."""
    number = next(n for n in itertools.count(1) if not Path(f"{run}.{n}").exists())
    run.rename(f"{run}.{number}")
    print(f"{run} held an earlier run: moved to {run}.{number}")
    run.mkdir(exist_ok=True)
    _lock(run, stack)


def describe(config: Config, policy, train_samples: list[Sample], eval_samples: list[Sample]) -> str:
    """The derived sizes of a run, so that a wrong setting is seen before it costs a day."""
    _, ranks = distributed.init()
    parameters = list(policy.model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    answers = config.batch_size * config.num_generations
    epochs = config.steps * config.batch_size / len(train_samples)
    trained = f" ({trained / 1e6:.2f} M of them trained)" if trained < count else ""
    return (
        f"{config.model}: {count / 1e6:.2f} M parameters{trained} on {ranks} x {policy.device},"
        f" {config.precision}, {torch.get_num_threads()} thread(s)\n"
        f"{len(train_samples)} sentences to train on, {len(eval_samples)} held out; {config.steps} steps of"
        f" {config.batch_size} prompts x {config.num_generations} = {answers} answers, {epochs:.1f} epochs"
    )


def check_start(config: Config) -> None:
    """Find what would end the run later. (A group lives on one rank.) Raises UserError."""
    check_trackers(config)
    load_plugins(config.rewards, config.think)
    _, world_size = distributed.init()
    for key, part in {"batch_size": config, "sft.batch_size": config.sft}.items():
        if part.steps and part.batch_size % world_size:
            below = part.batch_size // world_size * world_size
            nearest = f"{below} or {below + world_size}" if below else str(world_size)
            what = f"{part.batch_size} prompts do not divide among {world_size} ranks; {nearest} would"
            raise ConfigError(f"{key}: {what}")
