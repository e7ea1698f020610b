"""Controls: the same questions about other frames, to see whether a model looks at the video.

    python evaluate.py RUN --control shuffled    the frames of the clip in a random order: what moves where,
                                                 and when, is lost
    python evaluate.py RUN --control blank       mid-grey frames: what is left is the sentence, and habit
    python evaluate.py RUN --control other       the frames of another video of the split

The pixels alone change. There are as many frames as before and of the same size, so that the prompt is the
same to the last token, and the answers are scored against the same truth. Not in the paper.
"""

from collections.abc import Iterable

import numpy as np
import torch

from runtime.files import DataError
from samples import Sample
from video.frames import resize
from video.loader import FrameLoader

CONTROLS = {  # name -> what is shown
    "shuffled": "the frames of the clip in a random order",
    "blank": "grey frames",
    "other": "the frames of another video",
}
GREY = 128  # of 255


def shuffled(frames: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """The frames (T, h, w, 3) in a random order, which depends on T, the seed and the sample's number."""
    order = np.random.default_rng((seed, number)).permutation(len(frames))
    return frames[torch.from_numpy(order)]


def blank(frames: torch.Tensor) -> torch.Tensor:
    """Mid-grey frames of the same shape."""
    return torch.full_like(frames, GREY)


def fitted(frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Frames of another clip, uint8 (T', h', w', 3), in the given shape (T, h, w, 3): from the first to the
    last, played faster or slower, and each resized."""
    count, height, width, _ = shape
    frames = frames[torch.linspace(0, len(frames) - 1, count).round().long()]
    return frames if frames.shape == shape else resize(frames, (width, height))


def other_sample(split: list[Sample], number: int) -> Sample:
    """The next sample of the split, after the last one the first, that is about another video. Raises
    DataError where all are about one."""
    own = split[number].video
    for k in range(number + 1, number + len(split)):
        sample = split[k % len(split)]
        if sample.video != own:
            return sample
    raise DataError(
        f"--control other: the split has no other video than {own}; use --control blank or shuffled, or set"
        " eval_annotations to a split with more videos"
    )


class Controlled:
    """FrameLoader (clips.py) whose frames are a control's.

    They depend on the split, the seed and the sample's number in the split alone: on any number of ranks,
    and when an evaluation goes on, they are the same.
    """

    def __init__(self, clips: FrameLoader, control: str, split: list[Sample], seed: int):
        """control: one of CONTROLS. split: the whole split, also beyond eval_limit, which changes no
        answer."""
        self.clips, self.control, self.split, self.seed = clips, control, split, seed
        self.numbers = {sample.id: number for number, sample in enumerate(split)}

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """As FrameLoader.ahead, for all that is needed for these."""
        wanted = []
        for sample in samples:
            other = [other_sample(self.split, self.numbers[sample.id])] if self.control == "other" else []
            wanted += [sample, *other]
        self.clips.prefetch(wanted)

    def frames(self, sample: Sample) -> torch.Tensor | None:
        """What is shown instead of the sample's frames, uint8 (T, h, w, 3) as they are. None (on_bad_video:
        skip) where these cannot be read, or those of the other video."""
        own, number = self.clips.frames(sample), self.numbers[sample.id]
        if own is None:
            return None
        if self.control == "shuffled":
            return shuffled(own, self.seed, number)
        if self.control == "blank":
            return blank(own)
        other = self.clips.frames(other_sample(self.split, number))
        return None if other is None else fitted(other, own.shape)
