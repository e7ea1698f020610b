"""Ask a model about one video: when does the event of a sentence happen, and where is its subject?

    python answer.py VIDEO "SENTENCE" ["SENTENCE" ...]     asks the last finished run below runs/
    python answer.py VIDEO "SENTENCE" CHECKPOINT [CONFIG.yaml ...] [key=value ...]
    python answer.py                                       asks that run, or the toy, a held-out sentence

No annotations are needed. The first word is the video. CHECKPOINT is a folder (a run, a checkpoint,
adapters) or a hub id such as Qwen/Qwen3-VL-8B-Instruct. Its settings are those of its run; without a run the
defaults of config.py, and the coordinates of its family. All other words are sentences.

Prints the interval and, for each step, the thinking and the final box (x1, y1, x2, y2) in pixels of the
file. Steps count from the beginning of the clip, seconds from that of the file. With --json a line for each
sentence:

    {video, model, sentence, text: the answer as it is, truncated: cut off at max_new_tokens,
     steps, seconds: the interval or null, problems: [...], boxes: [{step, seconds, think, pred}, ...],
     samples: of each sampled answer text to boxes, agreement: of their tubes, 0 to 1 or null}

Draws a picture of the steps (thinking boxes blue, final ones red) and, with --video, the clip with its boxes,
interpolated as the metrics do. Pictures need matplotlib, an .mp4 also av.
"""

import contextlib
import itertools
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

from config import DTYPES, Config, check_words, load_config
from runtime.files import UserError, check_first, run_script

if __name__ == "__main__":  # a wrong setting is said before the imports below, which take seconds
    check_first(lambda: check_words(sys.argv[1:]))

import numpy as np
import torch

from data import SECONDS, TEXT, load_samples
from evaluate import find_checkpoint
from metrics import Tube, native_scores, tube_of
from model import make_prompt, rollout
from prompts import parse_answer, to_text_box, where_it_fails
from qwen.checkpoint import Policy, load_policy
from rewards import is_valid
from runtime import distributed
from samples import Sample, Track
from toy import world
from video.frames import VideoError, probe
from video.loader import FrameLoader


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="VIDEO | SENTENCE | CHECKPOINT | CONFIG | key=value")
    parser.add_argument("--begin", type=float, metavar="SECONDS", help="where the clip begins in the file")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="where it ends")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="N sampled answers, too")
    parser.add_argument("--raw", action="store_true", help="print the texts of the answers, too")
    parser.add_argument("--json", action="store_true", help="print an object for each sentence")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="instead of answers/VIDEO.png")
    parser.add_argument("--video", type=Path, metavar="MP4|GIF", help="the clip with its boxes")
    options = parser.parse_intermixed_args(arguments)
    if options.samples < 0:
        raise UserError(f"--samples {options.samples}: must be 0 or more")
    film = load_film(options.picture, options.video)  # before the model: what it takes may be missing
    video, sentences, checkpoint, configs, settings = sort_words(options.words)
    checkpoint, configs, config = find_model(checkpoint, configs, settings)
    span = options.begin, options.end
    if not video:
        video, sentences, span = held_out_question(config)
    clip = clip_of(video, *span)
    begin, end = (frame / clip.fps for frame in (clip.begin_frame, clip.begin_frame + clip.num_frames))
    say(f"model: {checkpoint}, settings of {', '.join(configs) or 'config.py'}")
    say("\nsentence: ".join([f"clip: {video}, {begin:.2f} to {end:.2f} s", *sentences]))
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = load_policy(checkpoint, getattr(torch, DTYPES[config.precision]), distributed.device())
    if not configs and not any(word.startswith("coordinates=") for word in settings):
        config = replace(config, coordinates=policy.family.coordinates)
        say(f"coordinates: {config.coordinates}, those of {policy.family.name}")
    asked = []
    samples = [replace(clip, sentence=sentence) for sentence in sentences]
    for sample, records in zip(samples, ask(policy, samples, config, options.samples), strict=True):
        greedy, *sampled = [tell(record, sample, config) for record in records]
        told = {"video": video, "model": checkpoint, "sentence": sample.sentence} | greedy
        if sampled:
            tubes = [tube_of(record, sample, config) for record in records[1:]]
            told |= {"samples": sampled, "agreement": agreement(tubes, sample)}
        print(json.dumps(told) if options.json else as_text(told, options.raw))
        number = f"{len(asked) + 1}. " if len(samples) > 1 else ""
        asked.append((sample, records, f"{number}{sample.sentence}: {in_a_line(greedy)}"))
    if film:
        picture = options.picture or Path("answers", f"{Path(video).stem}.png")
        film.save_picture(picture, asked, config)
        say(f"picture: {picture}")
    if options.video:
        film.save_film(options.video, asked, config)
        say(f"video: {options.video}")


def say(text: str) -> None:
    print(text, file=sys.stderr)


def load_film(picture: Path | None, video: Path | None):
    """lab.film; None, and a line that says why, where a package for pictures is missing. Raises UserError."""
    if video and video.suffix not in (".mp4", ".gif"):
        raise UserError(f"--video {video}: write a name that ends in .mp4 or .gif")
    if picture and picture.suffix != ".png":
        raise UserError(f"--picture {picture}: write a name that ends in .png")
    try:
        from lab import film

        if video and video.suffix == ".mp4":
            import av  # noqa: F401
    except ImportError as error:
        missing = f"{video or 'no picture'}: {error.name} is missing; pip install -r requirements-dev.txt"
        if video:
            raise UserError(missing) from None
        return say(missing)
    return film


def sort_words(words: list[str]) -> tuple[str, list[str], str, list[str], list[str]]:
    """Video, sentences, checkpoint, configs and settings among the words. Raises UserError."""
    settings = [word for word in words if re.match(r"[a-z_]+(\.\S+)?=", word)]
    configs = [word for word in words if word.endswith((".yaml", ".yml"))]
    others = [word for word in words if word not in settings + configs]
    folders = [word for word in others if word and Path(word).is_dir()]
    video = others.pop(0) if others and others[0] not in folders else ""
    checkpoints = [word for word in others if word in folders or re.fullmatch(r"\S+/\S+", word)]
    sentences = [word for word in others if word not in checkpoints]
    if len(checkpoints) > 1:
        raise UserError(f"several models: {', '.join(checkpoints)}; name one")
    if video and not Path(video).is_file():
        raise UserError(f"{video}: no such video; it stands first, before the sentences")
    if bool(video) != bool(sentences):
        raise UserError("name a VIDEO, a file, and then one SENTENCE or more, in quotes; or neither")
    for sentence in sentences:
        if not TEXT[1](sentence):
            raise UserError(f"the sentence {sentence[:60]!r} must be {TEXT[0]}")
    return video, sentences, "".join(checkpoints), configs, settings


def find_model(checkpoint: str, configs: list[str], settings: list[str]) -> tuple[str, list[str], Config]:
    """The checkpoint, the files of its settings, and these. No reward that they name is run. Raises
    ConfigError."""
    if not checkpoint and not configs:
        finished = sorted(Path("runs").glob("*/checkpoint"), key=lambda path: path.stat().st_mtime)
        checkpoint = str(finished[-1]) if finished else ""
        configs = [] if finished else [str(Path(__file__).with_name("configs") / "toy.yaml")]
    folder = Path(checkpoint).resolve()
    if checkpoint and any((place / "config.yaml").is_file() for place in (folder, folder.parent)):
        checkpoint, _, _ = find_checkpoint([checkpoint], [])
        configs = configs or [str(Path(checkpoint).with_name("config.yaml"))]
    config = load_config(configs, settings)
    return checkpoint or config.model, configs, replace(config, on_bad_video="error", frame_cache="")


def held_out_question(config: Config) -> tuple[str, list[str], tuple[float, float | None]]:
    """Video, sentence and seconds of the first held-out sentence. Of the toy's world, where it is not there,
    one clip is made. Raises DataError."""
    if config.toy and not Path(config.eval_annotations).is_file():
        objects = world.draw_objects(np.random.default_rng((world.SPLITS["test"][1], 0)))
        path = Path("answers/toy.y4m")
        path.parent.mkdir(exist_ok=True)
        world.write_y4m(path, world.render(objects, world.NATIVE_FPS), world.NATIVE_FPS)
        return str(path), [objects[0].sentence], (0.0, None)
    sample = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)[0][0]
    frames = sample.begin_frame, sample.begin_frame + sample.num_frames
    return sample.video, [sample.sentence], tuple(frame / sample.fps for frame in frames)


def clip_of(video: str, begin: float | None, end: float | None) -> Sample:
    """The part of a file between two seconds, as a sample without sentence or truth. Raises VideoError."""
    header = probe(video)
    fps, begin = header.fps, begin or 0.0
    end = header.seconds if end is None else min(end, header.seconds)
    if not 0 <= begin < end:
        raise VideoError(f"{video} lasts {header.seconds:.2f} s: nothing of it is between --begin and --end")
    if not SECONDS[1](end - begin):
        raise VideoError(f"{video}: {end - begin:.0f} s must be {SECONDS[0]}; set --begin and --end")
    num_frames = max(1, int((end - begin) * fps + 1e-3))
    first = min(round(begin * fps), header.frames - num_frames)
    size, no_boxes = (header.width, header.height), Track(0, np.empty((0, 4)))
    return Sample(video, video, "", *size, num_frames, fps, first, header.frames, 0, 0, no_boxes)


def ask(policy: Policy, samples: list[Sample], config: Config, num_samples: int) -> list[list[dict]]:
    """The answers to sentences about one clip, as records like those of predictions.jsonl: for each sentence
    the greedy one, then sampled ones. Raises UserError for a clip that cannot be read, or is too long."""
    with contextlib.closing(FrameLoader(config, policy.size_factor)) as loader:
        frames = loader.frames(samples[0])  # (T, h, w, 3)
    prompts = [make_prompt(policy, sample, frames, config.text_format) for sample in samples]
    tokens = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    most = policy.model.config.get_text_config().max_position_embeddings
    remedy = "cut the clip with --begin and --end, or lower fps or max_side"
    if tokens > most:
        raise UserError(f"question and answer take {tokens} tokens, and the model {most}; {remedy}")
    keys = [(config.seed, n) for n in range(len(prompts))]
    rounds = [(1, 0.0), (num_samples, config.temperature)]
    try:
        answers = [rollout(policy, prompts, n, config.max_new_tokens, t, keys) for n, t in rounds if n]
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory is too small; {remedy}, or ask less at once") from None
    records = []
    for prompt, *groups in zip(prompts, *answers, strict=True):
        said = [{"completion": c.text, "truncated": c.truncated} for group in groups for c in group]
        records.append([record | {"scale": prompt.scale} for record in said])
    return records


def tell(record: dict, sample: Sample, config: Config) -> dict:
    """What an answer says, in pixels and seconds of the file; keys as above."""
    text, answer = record["completion"], parse_answer(record["completion"], config.think)
    told = {"text": text, "truncated": record["truncated"], "steps": None, "seconds": None}
    if answer is None:
        cut = f"cut off at max_new_tokens={config.max_new_tokens} (raise it); " * record["truncated"]
        return told | {"problems": [f"malformed: {cut}{where_it_fails(text, config.think)}"], "boxes": []}
    grid, (start, end) = sample.grid(config.text_format.step_seconds), answer.span
    answer, last, problems = answer.in_frame(record["scale"]), grid.num_steps - 1, []
    boxes = [*(answer.think or ()), *answer.pred]
    flat = sorted({step for step, box in boxes if not is_valid(box)})
    outside = sorted({step for step, _ in boxes if not start <= step <= end})
    problems += ["the interval is empty: it ends before it begins"] if end < start else []
    problems += [f"the interval leaves the clip, whose last step is {last}"] if end > last else []
    problems += [f"boxes of steps {flat} have no inside"] if flat else []
    problems += [f"boxes of steps {outside} are outside the interval and do not count"] if outside else []

    def second(step: int) -> float:
        return round((sample.begin_frame + grid.first_frame(step)) / sample.fps, 3)

    rows = {step: {"step": step, "seconds": None} for step in sorted({step for step, _ in boxes})}
    for step in rows.keys() & set(range(grid.num_steps)):  # the clip has no others
        rows[step]["seconds"] = second(step)
    for name, items in (("think", answer.think_boxes), ("pred", answer.pred_boxes)):
        for step, row in rows.items():
            row[name] = to_text_box(items[step], (sample.width, sample.height)) if step in items else None
    seconds = [second(start), second(end + 1)] if start <= min(end, last) else None
    return told | {"steps": [start, end], "seconds": seconds, "problems": problems, "boxes": [*rows.values()]}


def agreement(tubes: list[Tube | None], sample: Sample) -> float | None:
    """The mean vIoU of all pairs of answers; one that failed has 0 with every other. None for no pair."""
    scores = []
    for one, other in itertools.combinations(tubes, 2):
        (first, stop), boxes = other or ((0, 0), sample.boxes)
        truth = replace(sample, first_frame=first, stop_frame=stop, boxes=boxes)
        scores.append(native_scores(one, truth)["vIoU"])
    return float(np.mean(scores)) if scores else None


def as_text(told: dict, raw: bool) -> str:
    """What `tell` has found, for people. A malformed answer is printed as it is."""
    lines = ["", told["sentence"], in_a_line(told)]
    if told["boxes"]:
        lines.append("  step   seconds  think                 pred")
    for row in told["boxes"]:
        think, pred = (", ".join(map(str, row[name] or "-")) for name in ("think", "pred"))
        moment = "-" if row["seconds"] is None else f"{row['seconds']:.2f}"
        lines.append(f"{row['step']:>6}  {moment:>8}  {think:<20}  {pred}")
    lines += [told["text"]] if raw or not told["steps"] else []
    for sampled in told.get("samples", []):
        lines += [f"sampled: {in_a_line(sampled)}", *([sampled["text"]] if raw else [])]
    if told.get("agreement") is not None:
        lines.append(f"agreement: {told['agreement']:.2f}, the mean vIoU over all pairs of sampled answers")
    # Control characters, which a terminal would obey, are printed as their numbers.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in "\n".join(lines))


def in_a_line(told: dict) -> str:
    """The interval and the problems."""
    seconds = "{:.2f} to {:.2f} s, ".format(*told["seconds"]) if told["seconds"] else ""
    steps = "steps {} to {}".format(*told["steps"]) if told["steps"] else ""
    return "; ".join([*filter(None, [seconds + steps]), *told["problems"]])


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "the picture")
