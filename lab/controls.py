"""Ask about replaced frames: does the model look at the video?

    python -m lab.controls RUN [blank shuffled other] [key=value ...]    a run of train.py; default: all three
    python -m lab.controls CHECKPOINT CONFIG [blank shuffled other]      any Qwen-VL, as in evaluate.py
    torchrun --nproc_per_node=8 -m lab.controls RUN                      the same answers from eight GPUs

The table has the real video first, then a row for each control, in the protocol `native`. Only pixels change:
there are as many frames as before, of the same size, so prompt and truth stay the same. Answers go to
predictions_blank.jsonl and so on, beside evaluate.py's, and are resumed in the same way. Not in the paper.
"""

import sys
from collections.abc import Iterable

import numpy as np
import torch

from evaluate import decode_split, find_checkpoint, load_split, open_checkpoint, score_predictions
from metrics import format_table
from runtime import distributed
from runtime.files import DataError, run_script
from runtime.predictions import fingerprint_of, missing_samples, path_for_answers, saved_answers
from samples import Sample
from video.frames import resize
from video.loader import FrameLoader

CONTROLS = {  # name -> what is shown, and what is lost with it
    "shuffled": "the frames of the clip in a random order",  # when and where something moves
    "blank": "grey frames",  # all but the sentence, and habit
    "other": "the frames of another video",
}


def other_sample(split: list[Sample], number: int) -> Sample:
    """The next sample of the split, after the last one the first, that is about another video. Raises
    DataError if all are about one."""
    for sample in split[number + 1 :] + split[:number]:
        if sample.video != split[number].video:
            return sample
    raise DataError(f"control other: the split has no other video than {split[number].video}; leave it out")


def fit_frames(frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Frames of another clip, uint8 (T', h', w', 3), in the given shape (T, h, w, 3): played faster or slower
    from the first to the last, and resized."""
    frames = frames[torch.linspace(0, len(frames) - 1, shape[0]).round().long()]
    return frames if frames.shape == shape else resize(frames, (shape[2], shape[1]))


class ControlledLoader:
    """A FrameLoader that replaces the frames. What it shows depends on the whole split, the seed and the
    sample's number alone, so it is the same on any number of ranks and after a resume."""

    def __init__(self, loader: FrameLoader, control: str, split: list[Sample], seed: int):
        self.loader, self.control, self.split, self.seed = loader, control, split, seed
        self.numbers = {sample.id: number for number, sample in enumerate(split)}

    def sources(self, sample: Sample) -> list[Sample]:
        """The sample, and for `other` the one whose frames stand in."""
        other = [other_sample(self.split, self.numbers[sample.id])] if self.control == "other" else []
        return [sample, *other]

    def prefetch(self, samples: Iterable[Sample]) -> None:
        self.loader.prefetch([source for sample in samples for source in self.sources(sample)])

    def frames(self, sample: Sample) -> torch.Tensor | None:
        """uint8 (T, h, w, 3), as many and as large as the sample's own. None (on_bad_video: skip) if these,
        or those of the other video, cannot be read."""
        own, *others = clips = [self.loader.frames(source) for source in self.sources(sample)]
        if any(clip is None for clip in clips):
            return None
        if self.control == "shuffled":
            order = np.random.default_rng((self.seed, self.numbers[sample.id])).permutation(len(own))
            return own[torch.from_numpy(order)]
        return fit_frames(others[0], own.shape) if others else torch.full_like(own, 128)


def main(arguments: list[str]) -> None:
    settings = [word for word in arguments if "=" in word]
    controls = [word for word in arguments if word in CONTROLS]
    places = [word for word in arguments if word not in (*settings, *controls)]
    if not places or places[0].startswith("-"):
        sys.exit(__doc__.strip())
    checkpoint, wanted, config = find_checkpoint(places, settings)
    split, _ = load_split(config, config.eval_annotations)
    samples, files, missing = split[: config.eval_limit or None], {}, []
    for control in ("", *(controls or CONTROLS)):
        fingerprint = fingerprint_of(checkpoint, config, control)
        name = f"{wanted.stem}_{control}" if control else wanted.stem
        path = path_for_answers(wanted.with_stem(name), fingerprint)
        files[control] = path, fingerprint
        missing += [sample for _, sample in missing_samples(samples, saved_answers(path, fingerprint))]
    rows = {}
    with open_checkpoint(checkpoint, config, missing) as (policy, loader):
        for control, (path, fingerprint) in files.items():
            shown = ControlledLoader(loader, control, split, config.seed) if control else loader
            answers = decode_split(policy, samples, shown, config, path, fingerprint)
            rows[CONTROLS.get(control, "the video")] = score_predictions(answers, samples, config)["native"]
    if distributed.init()[0] == 0:
        print(format_table(rows))
    distributed.destroy()


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "the file of answers")
