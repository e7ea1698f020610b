"""The text and the positions that Qwen-VL reads a video by. `policy` is a qwen.checkpoint.Policy."""

import torch
from torch import Tensor

VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"


def render_chat(tokenizer, text: str) -> str:
    """Render what the user says about a video, up to where the answer begins, with one <|video_pad|>."""
    content = [{"type": "video", "video": ""}, {"type": "text", "text": text}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


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
