"""A sample as the model is shown it, in one call and one process."""

import torch

from model import make_prompt
from video.frames import clip_frames


def shown_prompt(policy, sample, max_side, text_format):
    frames = clip_frames(sample, text_format.fps, max_side, policy.size_factor)
    return make_prompt(policy, sample, torch.from_numpy(frames), text_format)
