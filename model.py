"""Qwen-VL as a policy: encode a prompt, sample answers, score answers.

The weights and what they compute are those of transformers. Two things are done our way, since the obvious
way is wrong or slow:
  * 3-D rotary positions are computed here and passed to every call (rope_positions says why);
  * a prompt, vision tower included, is read once for its G answers (encode), which are sampled (rollout)
    and scored (completion_logprobs) as continuations of the same keys and values (attention.py).
"""

import types
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from prompts import TextFormat, build_prompt
from qwen.attention import NO_MASK, AnswerAttention, DecodeAttention, KeysValues, PromptAttention
from qwen.checkpoint import VIDEO_BLOCK, Policy, render_chat
from runtime.files import ModelError
from samples import Sample

# ----------------------------------------------------------------------------------------------------------
# The prompt


@dataclass
class Prompt:
    """All that the model sees before it answers."""

    ids: torch.Tensor  # (P,) long
    positions: torch.Tensor  # (3, P) long: rotary positions in time, height and width
    frames: torch.Tensor  # (T, h, w, 3) uint8; cut into patches when they are needed, a 16th of the memory
    scale: tuple[int, int]  # (width, height) that the boxes of its answers are measured in
    # (1 + D, n, H) what a frozen vision tower made of the frames (see); None: it has to run each time
    features: torch.Tensor | None = None

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


def make_prompt(policy: Policy, sample: Sample, frames: torch.Tensor, text_format: TextFormat) -> Prompt:
    """A sample and the frames of its clip (clips.FrameLoader) -> what the model is shown. Sampling and
    scoring, training and evaluation all come through here. Raises ModelError.

    frames: (T, h, w, 3) uint8, text_format.fps of them a second; fewer than annotated where the file ends
    early, and then the prompt speaks of fewer steps.
    """
    scale = text_format.scale((frames.shape[2], frames.shape[1]), (sample.width, sample.height))
    text = build_prompt(sample.sentence, text_format.num_steps(len(frames)), scale, text_format)
    return encode_prompt(policy, frames, text, scale, text_format.fps)


def encode_prompt(
    policy: Policy, frames: torch.Tensor, text: str, scale: tuple[int, int], fps: float
) -> Prompt:
    """frames: (T, h, w, 3) uint8, fps of them a second, sides multiples of policy.size_factor. text: what the
    user says about them. scale: as in Prompt. Raises ModelError for a text with special tokens; warns where
    the frames lie outside the checkpoint's pixel budget.

    The ids are those of the checkpoint's chat template, with one <|video_pad|> for each visual token."""
    if "<|" in text:
        raise ModelError(f"the text {text!r} holds '<|', the mark of Qwen's special tokens: remove it")
    t = -(-len(frames) // policy.temporal_patch_size)
    h, w = frames.shape[1] // policy.size_factor, frames.shape[2] // policy.size_factor
    seconds_per_grid = policy.temporal_patch_size / fps

    _warn_outside_budget(policy, t * policy.temporal_patch_size, frames.shape[1], frames.shape[2])
    chat = render_chat(policy.tokenizer, text)
    pads = "<|video_pad|>" * (h * w)
    if policy.family.timed == "text":
        # Qwen3-VL: a block for each temporal patch, after the mean time of its frames, in place of the one
        # block. So do transformers 4.57, the release of the weights, and vLLM; transformers 5.23 puts the
        # blocks *inside* the one block's <|vision_start|> and <|vision_end|>, two tokens more (vllm #46817).
        firsts = range(0, len(frames), policy.temporal_patch_size)
        lasts = (min(i + policy.temporal_patch_size, len(frames)) - 1 for i in firsts)  # a copy has its time
        times = [(first / fps + last / fps) / 2 for first, last in zip(firsts, lasts, strict=True)]
        blocks = "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
        temporal = [torch.zeros(1)] * t
    else:
        blocks = VIDEO_BLOCK.replace("<|video_pad|>", pads * t)
        rate = 1.0
        if policy.family.timed == "seconds":
            rate = policy.model.config.vision_config.tokens_per_second * seconds_per_grid
        temporal = [(torch.arange(t) * rate).floor()]  # in float before the floor
    ids = torch.tensor(
        policy.tokenizer(chat.replace(VIDEO_BLOCK, blocks), add_special_tokens=False)["input_ids"]
    )
    return Prompt(ids, rope_positions(ids, policy.video_id, temporal, h, w), frames, scale)


def _warn_outside_budget(policy: Policy, count: int, height: int, width: int) -> None:
    """Say, once for each size of frames, that the model was never shown such: its own preprocessor would have
    enlarged or shrunk them. No error: the size is ours to choose (STVG-o1, section 4), and a long clip of
    VidSTG (180 s of 640 x 480) exceeds the budget of Qwen3-VL's published checkpoints, and can be learned."""
    low, high = policy.pixel_budget
    per_video, area = policy.family.budget_per == "video", height * width
    pixels = area * count if per_video else area
    if low <= pixels <= high:
        return
    # The number of frames is not told, only where the limit lies: the message is then the same for all clips
    # of one size, and Python shows it once.
    limit, side = (low, "below") if pixels < low else (high, "above")
    frames = f" of {'less' if pixels < low else 'more'} than {limit / area:.1f} frames" if per_video else ""
    change = "raise max_side" if pixels < low else "lower max_side, or fps" if per_video else "lower max_side"
    warnings.warn(
        f"{width} x {height} pixels{frames}: {side} the {low:,} to {high:,} of a {policy.family.budget_per}"
        f" that this checkpoint was shown; {change}, unless training is to get it used to such",
        stacklevel=3,
    )


def rope_positions(
    ids: torch.Tensor, video_id: int, temporal: list[torch.Tensor], h: int, w: int
) -> torch.Tensor:
    """3-D rotary positions (3, P) of a prompt whose video tokens come in len(temporal) blocks of t x h x w.

    Text counts on by one on all three axes; a block starts where the text stood and spreads over time, height
    and width; the text after it goes on at the *largest* of its positions + 1. That is what the weights were
    trained with. transformers >= 5.3 forgets the time axis there, and decodes at yet other positions, so its
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


def with_video_features(policy: Policy, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with what the vision tower makes of their frames, where it is frozen: then it runs once
    for the samples, the scores and the reference. Where it is trained, the prompts as they are.

    On a sharded model all ranks must call it together, or each within distributed.unsharded.
    """
    if not prompts or any(p.requires_grad for p in policy.model.model.visual.parameters()):
        return prompts
    inputs = _visual_inputs(policy, prompts)

    def encode(model: torch.nn.Module) -> list[torch.Tensor]:
        out = model.model.get_video_features(*inputs.values(), return_dict=True)
        # Qwen3-VL's first D decoder layers get features of their own.
        levels = [out.pooler_output, *getattr(out, "deepstack_features", [])]
        return [torch.stack(features).cpu() for features in zip(*levels, strict=True)]

    with torch.no_grad():
        features = policy.run(encode)
    return [replace(prompt, features=f) for prompt, f in zip(prompts, features, strict=True)]


def _visual_inputs(policy: Policy, prompts: list[Prompt]) -> dict:
    """The patches of all prompts, one after the other, and the (t, h, w) of each; or the features of each."""
    if all(prompt.features is not None for prompt in prompts):
        levels = zip(*(prompt.features.to(policy.device) for prompt in prompts), strict=True)
        pooled, *deep = levels  # each of B tensors (n, H)
        video = types.SimpleNamespace(pooler_output=pooled, deepstack_features=deep)
        return {"mm_encoder_outputs": {"video": video}}
    patches = [policy.patches(prompt.frames) for prompt in prompts]
    return {
        "pixel_values_videos": torch.cat([values for values, _ in patches]).to(policy.device),
        "video_grid_thw": torch.stack([grid for _, grid in patches]).to(policy.device),
    }


# ----------------------------------------------------------------------------------------------------------
# Reading a prompt


@dataclass
class PromptCache:
    """What a policy makes of a prompt, of which its answers are continuations."""

    prefix: list[KeysValues]  # of each layer
    state: torch.Tensor  # (H,) from which the first token of an answer is predicted


def prefill(policy: Policy, prompts: list[Prompt]) -> list[PromptCache]:
    """Vision tower and language model over B prompts, once for all their answers. Where gradients are enabled
    they flow back through what is returned."""
    return policy.run(_prefill, policy, prompts)


def _prefill(model: torch.nn.Module, policy: Policy, prompts: list[Prompt]) -> list[PromptCache]:
    lengths = [len(prompt.ids) for prompt in prompts]
    attention = PromptAttention(lengths)
    states = _states(
        model,
        torch.cat([prompt.ids for prompt in prompts]),
        torch.cat([prompt.positions for prompt in prompts], 1),
        attention,
        **_visual_inputs(policy, prompts),
    )
    ends = torch.tensor(lengths).cumsum(0) - 1
    return [PromptCache(*parts) for parts in zip(attention.prefixes(), states[ends], strict=True)]


def _states(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, attention, **visual):
    """ids: (n,), of one packed row; positions: (3, n). Returns the hidden states (n, H)."""
    out = model.model(
        input_ids=ids[None].to(model.device),
        position_ids=positions[:, None].to(model.device),
        attention_mask=NO_MASK,
        use_cache=False,
        shared_prefix=attention,
        **visual,
    )
    return out.last_hidden_state[0]


# ----------------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Completion:
    ids: list[int]  # the sampled tokens, the one that ended the answer included
    text: str  # without that token
    truncated: bool  # ran into max_new_tokens


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: list[Prompt],
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    keys: list,
    encoded: list[PromptCache] | None = None,
    block: int = 8,
    static: bool = False,
) -> list[list[Completion]]:
    """Sample num_generations (G) answers to each of B prompts, at temperature 0 the single greedy one.

    keys: for each prompt a tuple of non-negative integers, such as (seed, step, number of the prompt): answer
    g draws its random numbers from its key and g, so it is the same whoever else is in the batch. Keys of
    different length, as of training and evaluation, never give the same numbers.
    encoded: of the prompts, where this policy has read them already.
    block: after so many tokens, each time, rows whose answers have ended leave, as far as all prompts that
    are left keep equally many.
    static: they stay, and attention is to all max_new_tokens, those to come masked: no shape ever changes.
    """
    if not prompts:
        return []
    model, device, B, G = policy.model, policy.device, len(prompts), num_generations
    was_training = model.training
    model.eval()  # checkpointing has nothing to do here
    encoded = encoded or prefill(policy, prompts)
    states = torch.stack([prompt.state for prompt in encoded])
    logits = policy.run(lambda model: model.lm_head(states)).repeat_interleave(G, 0)  # (B * G, V)
    attention = DecodeAttention([prompt.prefix for prompt in encoded], G, max_new_tokens)
    if not static:
        attention.widen(min(block, max_new_tokens))
    position = torch.tensor([prompt.next_position for prompt in prompts], device=device).repeat_interleave(G)
    # The length stands first, since numpy takes [5, 0] and [5, 0, 0] for the same seed.
    seeds = [[len(key), *key, g] for key in keys for g in range(G)]
    uniform = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
    uniform = torch.tensor(uniform, device=device)  # (B * G, max_new_tokens)

    eos = torch.tensor(policy.eos_ids, device=device)
    forbidden = torch.tensor(policy.forbidden_ids, device=device)
    rows = torch.arange(B * G, device=device).view(B, G)  # which answer each row of the batch belongs to
    tokens = torch.zeros(B * G, max_new_tokens, dtype=torch.long, device=device)
    for t in range(max_new_tokens):
        row = rows.flatten()
        sampled = _sample(_policy_logits(logits, temperature, forbidden), uniform[row, t], temperature)
        tokens[row, t] = sampled
        if t + 1 == max_new_tokens:
            break
        if t and t % block == 0:
            ended = torch.isin(tokens[row, : t + 1], eos).any(1).view(rows.shape).cpu()
            if ended.all():
                break
            if not static:
                prompts_left, answers_left = _going_on(ended)
                if answers_left.numel() < rows.numel():
                    attention.keep(prompts_left, answers_left)
                    rows = rows[prompts_left[:, None], answers_left]
                    sampled = tokens[rows.flatten(), t]
                attention.widen(min(t + block, max_new_tokens))
        logits = policy.run(_next_logits, sampled, position[rows.flatten()], attention)
    model.train(was_training)
    done = [_completion(policy, ids) for ids in tokens.tolist()]
    return [done[b * G : (b + 1) * G] for b in range(B)]


def _next_logits(
    model: torch.nn.Module, tokens: torch.Tensor, first: torch.Tensor, attention: DecodeAttention
) -> torch.Tensor:
    """(rows, V) of the tokens after these, (rows,). first: (rows,) position of each answer's first token."""
    out = model.model(
        input_ids=tokens[:, None],
        position_ids=(first + attention.step).expand(3, -1)[..., None],
        attention_mask=NO_MASK,
        use_cache=False,
        shared_prefix=attention,
    )
    attention.advance()
    return model.lm_head(out.last_hidden_state[:, 0])


def _going_on(ended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ended: (B, G), of which answers. Returns which prompts to go on with, (B',), and which answers to each,
    (B', G'): those that go on and, where they are fewer than of another prompt, some that have ended."""
    prompts = (~ended).any(1).nonzero().flatten()
    most = int((~ended).sum(1).max())
    return prompts, ended[prompts].int().argsort(dim=1, stable=True)[:, :most]


def _completion(policy: Policy, ids: list[int]) -> Completion:
    """ids: what was sampled, up to the end token and beyond."""
    end = next((n for n, token in enumerate(ids) if token in policy.eos_ids), None)
    text = policy.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
    return Completion(ids if end is None else ids[: end + 1], text, truncated=end is None)


def _policy_logits(logits: torch.Tensor, temperature: float, forbidden: torch.Tensor) -> torch.Tensor:
    """The one distribution that is sampled from and scored: fp32, at the temperature, no placeholders."""
    return (logits.float() / (temperature or 1.0)).index_fill_(-1, forbidden, -torch.inf)


def _sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row, (rows, V) -> (rows,): inverse transform sampling with the row's own uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


# ----------------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class PackedCompletions:
    """Completions of B prompts, R in all, packed for scoring: one row of M tokens, one after the other."""

    prompts: list[Prompt]
    lengths: list[list[int]]  # of each prompt, those of its completions
    ids: torch.Tensor  # (M,)
    positions: torch.Tensor  # (3, M)
    # (M,) which of B + M states predicts each token: those of the prompts' ends, then of the tokens
    source: torch.Tensor
    mask: torch.Tensor  # (R, C) which places of a padded table of completions are tokens


def pack_completions(
    policy: Policy, prompts: list[Prompt], completions: list[list[list[int]]]
) -> PackedCompletions:
    """completions[b][g]: token ids of answer g to prompt b. None may be empty."""
    lengths = [[len(completion) for completion in group] for group in completions]
    positions, source, m = [], [], len(prompts)
    for b, (prompt, group) in enumerate(zip(prompts, lengths, strict=True)):
        for n in group:
            positions.append(prompt.next_position + torch.arange(n))
            source += [b, *range(m, m + n - 1)]  # the first token follows the prompt
            m += n
    return PackedCompletions(
        prompts,
        lengths,
        torch.tensor([token for group in completions for completion in group for token in completion]),
        torch.cat(positions).expand(3, -1),
        torch.tensor(source, device=policy.device),
        completion_mask([n for group in lengths for n in group]).to(policy.device),
    )


def completion_mask(lengths: list[int]) -> torch.Tensor:
    """(R, C) true on the tokens of R completions in a table that is padded to the longest one's C."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def completion_logprobs(
    policy: Policy,
    batch: PackedCompletions,
    temperature: float,
    encoded: list[PromptCache] | None = None,
    chunk: int = 1024,
) -> torch.Tensor:
    """Log-probability of every completion token under the policy that is sampled from: (R, C), 0 on padding.

    encoded: of the batch's prompts, where this policy has read them already, with gradients if they are to be
    trained on. Each prompt is read once for its G answers, no padding is computed, and the (M, V) table of
    logits exists only a chunk of tokens at a time, in the backward pass too.
    """

    def logprobs_of(model: torch.nn.Module) -> torch.Tensor:  # (M,)
        read = encoded or _prefill(model, policy, batch.prompts)
        attention = AnswerAttention([prompt.prefix for prompt in read], batch.lengths)
        states = _states(model, batch.ids, batch.positions, attention)
        states = torch.cat([torch.stack([prompt.state for prompt in read]), states])[batch.source]  # (M, H)
        forbidden = torch.tensor(policy.forbidden_ids, device=states.device)

        def chunk_logprobs(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits = _policy_logits(model.lm_head(states), temperature, forbidden)  # (chunk, V)
            return -F.cross_entropy(logits, target, reduction="none")

        chunks = zip(states.split(chunk), batch.ids.to(states.device).split(chunk), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(chunk_logprobs, *c, use_reentrant=False) for c in chunks])
        return torch.cat([chunk_logprobs(*c) for c in chunks])

    logprobs = policy.run(logprobs_of)
    return torch.zeros(batch.mask.shape, device=logprobs.device).masked_scatter(batch.mask, logprobs)
