"""The text and the positions that Qwen-VL reads a video by. `policy` is a qwen.checkpoint.Policy."""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from runtime.files import ModelError

VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
QUESTION = "What happens?"  # stands for the text while a template is rendered
SECONDS, MEMORY, CHARACTERS = 5, 2**29, 20_000  # that a template may take; 2**29 bytes more than this process
RENDERED: dict[str, str] = {}  # by template and special tokens


def render_chat(tokenizer, text: str) -> str:
    """Render what the user says about a video, up to where the answer begins, with one <|video_pad|>.

    A chat template is a program of whoever made the checkpoint. It runs once, within limits, and never sees
    the text, which takes the place of QUESTION in what comes out. Raises ModelError if it fails.
    """

    def render() -> str:
        content = [{"type": "video", "video": ""}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    key = repr((tokenizer.chat_template, tokenizer.special_tokens_map))
    if key not in RENDERED:
        RENDERED[key] = _within_limits(render)
    return RENDERED[key].replace(QUESTION, text)


def _within_limits(function: Callable[[], str]) -> str:
    """What a function returns in a process of its own, which ends after SECONDS. Raises ModelError,
    with the kind and the first line of its error, or what it has exceeded."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as pipe:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            memory = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            signal.alarm(SECONDS)  # which ends the process
            try:
                text, why = function(), ""
                if len(text) > CHARACTERS:
                    text, why = "", f"more than {CHARACTERS} characters"
            except Exception as error:  # whatever the template does; raised again as a ModelError
                text, why = "", ": ".join([type(error).__name__, *str(error)[:200].splitlines()[:1]])
            json.dump([text, why], pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    text, why = json.loads(answer or f'["", "nothing within {SECONDS} s"]')
    if why:
        raise ModelError(why)
    return text


def video_text(policy, count: int, size: int, fps: float) -> tuple[str, list[Tensor]]:
    """Return the text of `count` frames, with `size` visual tokens for each temporal patch, and the temporal
    positions of each of its blocks: (t,)."""
    step = policy.temporal_patch_size
    t, pads = -(-count // step), "<|video_pad|>" * size
    if policy.family.timed != "text":
        vision = policy.model.config.vision_config
        rate = vision.tokens_per_second * (step / fps) if policy.family.timed == "seconds" else 1.0
        positions = (torch.arange(t) * rate).floor()  # in float before the floor
        return VIDEO_BLOCK.replace("<|video_pad|>", pads * t), [positions]
    # Qwen3-VL: a block for each temporal patch, after the mean time of its frames, in place of the one block.
    # So do transformers 4.57, the release of the weights, and vLLM. transformers 5.23 puts the blocks inside
    # the one block's <|vision_start|> and <|vision_end|>, two tokens more (vllm #46817).
    spans = [(i, min(i + step, count) - 1) for i in range(0, count, step)]  # a copy has its frame's time
    times = [(first / fps + last / fps) / 2 for first, last in spans]
    blocks = [f"<{time:.1f} seconds>{VIDEO_BLOCK.replace('<|video_pad|>', pads)}" for time in times]
    return "".join(blocks), [torch.zeros(1)] * t


def rope_positions(ids: Tensor, video_id: int, temporal: list[Tensor], h: int, w: int) -> Tensor:
    """Compute the 3-D rotary positions (3, P) of a prompt whose video tokens form len(temporal) blocks of
    t x h x w. temporal: (t,) positions of each block's slices.

    Text counts up by one on all three axes. A block starts at the text's position and spreads over time,
    height and width. The text after it continues at the *largest* of its positions + 1, as in the training of
    the weights. transformers >= 5.3 leaves out the time axis there and decodes at yet other positions, so its
    own positions are never used.
    """
    positions, start, k = torch.empty(3, len(ids), dtype=torch.long), 0, 0
    for times in temporal:
        video = k + int((ids[k:] == video_id).int().argmax())  # text up to the block, then the block
        positions[:, k:video] = start + torch.arange(video - k)
        start += video - k
        grid = torch.meshgrid(times.long(), torch.arange(h), torch.arange(w), indexing="ij")
        k = video + len(times) * h * w
        positions[:, video:k] = start + torch.stack(grid).flatten(1)
        start = int(positions[:, video:k].max()) + 1
    positions[:, k:] = start + torch.arange(len(ids) - k)
    return positions
