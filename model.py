"""Qwen-VL as a policy: build prompts, sample completions (rollout), score them (completion_logprobs).

The weights and what they compute are those of transformers. Two things are done our way, because the obvious
way is wrong or slow:
  * the 3-D rotary positions are our own (qwen/inputs.py), and passed to every call;
  * prefill computes a prompt once, vision tower included. Its G completions are sampled and scored as
    continuations of its keys and values (qwen/attention.py).
"""

import types
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prompts import TextFormat, build_prompt
from qwen.attention import KV, NO_MASK, AnswerAttention, DecodeAttention, PromptAttention
from qwen.checkpoint import Policy
from qwen.inputs import VIDEO_BLOCK, render_chat, rope_positions, video_text
from runtime.files import ModelError
from samples import Sample

COMPACT_EVERY = 8  # tokens of a rollout, after which finished completions leave the batch


@dataclass
class Prompt:
    """Everything the model sees before it answers."""

    ids: Tensor  # (P,) long
    positions: Tensor  # (3, P) long: rotary positions in time, height and width
    frames: Tensor  # (T, h, w, 3) uint8: a 16th of the memory of its patches, which are cut when needed
    scale: tuple[int, int]  # (width, height) of the coordinates that its boxes are written in
    # (1 + D, n, H) outputs of a frozen vision tower (with_video_features); None: the tower runs each time
    features: Tensor | None = None
    cache: "PromptCache | None" = None  # what the rollout made of it, with gradients (reuse_prompts)

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


def make_prompt(policy: Policy, sample: Sample, frames: Tensor, text_format: TextFormat) -> Prompt:
    """Build the prompt of a sample, for sampling and scoring alike. Raises ModelError.

    frames: (T, h, w, 3) uint8 of its clip, text_format.fps a second; fewer where the file ends early.
    """
    scale = text_format.scale((frames.shape[2], frames.shape[1]), (sample.width, sample.height))
    text = build_prompt(sample.sentence, text_format.num_steps(len(frames)), scale, text_format)
    return encode_prompt(policy, frames, text, scale, text_format.fps)


def encode_prompt(policy: Policy, frames: Tensor, text: str, scale: tuple[int, int], fps: float) -> Prompt:
    """Tokenize a video and a text with the checkpoint's chat template, one <|video_pad|> a visual token.

    frames: (T, h, w, 3) uint8, fps a second, sides multiples of policy.size_factor. Raises ModelError if the
    text holds special tokens.
    """
    if "<|" in text:
        raise ModelError(f"the text {text!r} holds '<|', which begins Qwen's special tokens: remove it")
    h, w = (side // policy.size_factor for side in frames.shape[1:3])
    video, temporal = video_text(policy, len(frames), h * w, fps)
    chat = render_chat(policy.tokenizer, text).replace(VIDEO_BLOCK, video)
    ids = torch.tensor(policy.tokenizer(chat, add_special_tokens=False)["input_ids"])
    return Prompt(ids, rope_positions(ids, policy.video_id, temporal, h, w), frames, scale)


def with_video_features(policy: Policy, prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts with the outputs of a frozen vision tower, which then runs once for rollout, policy
    and reference. Return them unchanged if the tower is trained.

    On a sharded model all ranks must call it together, or each within distributed.unsharded.
    """
    if not prompts or any(p.requires_grad for p in policy.model.model.visual.parameters()):
        return prompts
    inputs = _visual_inputs(policy, prompts)

    def run_tower(model: nn.Module) -> list[Tensor]:
        out = model.model.get_video_features(*inputs.values(), return_dict=True)
        # Qwen3-VL's first D decoder layers get features of their own.
        levels = [out.pooler_output, *getattr(out, "deepstack_features", [])]
        return [torch.stack(features).cpu() for features in zip(*levels, strict=True)]

    with torch.no_grad():
        features = policy.run(run_tower)
    return [replace(prompt, features=f) for prompt, f in zip(prompts, features, strict=True)]


def _visual_inputs(policy: Policy, prompts: list[Prompt]) -> dict:
    """Return the model's arguments for the videos: all patches in one row and the grids, or the features."""
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


@dataclass
class PromptCache:
    """A prompt as the model has computed it, for its completions to continue."""

    kv: list[KV]  # of each layer
    last_hidden: Tensor  # (H,) the last token's, which predicts the first token of a completion


def prefill(policy: Policy, prompts: list[Prompt]) -> list[PromptCache]:
    """Run the model over B prompts, once for all their completions. Gradients, if enabled, flow back."""
    return policy.run(_prefill, policy, prompts)


def _prefill(model: nn.Module, policy: Policy, prompts: list[Prompt]) -> list[PromptCache]:
    lengths = [len(prompt.ids) for prompt in prompts]
    attention = PromptAttention(lengths)
    ids = torch.cat([prompt.ids for prompt in prompts])
    positions = torch.cat([prompt.positions for prompt in prompts], 1)
    video = _visual_inputs(policy, prompts)
    hidden = _hidden_states(model, ids[None], positions[:, None], attention, **video)[0]
    last = torch.tensor(lengths).cumsum(0) - 1
    return [PromptCache(*parts) for parts in zip(attention.prefixes(), hidden[last], strict=True)]


def _hidden_states(model: nn.Module, ids: Tensor, positions: Tensor, attention, **visual) -> Tensor:
    """Return the last layer's hidden states (rows, n, H). ids: (rows, n); positions: (3, rows, n)."""
    inputs = {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device), **visual}
    out = model.model(attention_mask=NO_MASK, use_cache=False, shared_prefix=attention, **inputs)
    return out.last_hidden_state


@dataclass
class Completion:
    ids: list[int]  # the sampled tokens, with the one that ended it
    text: str  # without that token
    truncated: bool  # it reached max_new_tokens without an end


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: list[Prompt],
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    keys: list,
    caches: list[PromptCache] | None = None,
) -> list[list[Completion]]:
    """Sample num_generations (G) completions of each of B prompts; at temperature 0 the one greedy one.

    keys: one tuple of non-negative integers a prompt, such as (seed, step, number of the prompt). Completion
    g draws its random numbers from its key and g, so it does not depend on the rest of the batch. Keys of
    different length, as of training and evaluation, never give the same numbers.
    caches: of the prompts, if this policy has prefilled them.
    """
    if not prompts:
        return []
    model, device, B, G = policy.model, policy.device, len(prompts), num_generations
    was_training = model.training
    model.eval()  # no gradient checkpointing
    caches = caches or prefill(policy, prompts)
    hidden = torch.stack([cache.last_hidden for cache in caches])
    logits = policy.run(lambda model: model.lm_head(hidden)).repeat_interleave(G, 0)  # (B * G, V)
    attention = DecodeAttention([cache.kv for cache in caches], G, max_new_tokens)
    attention.widen(min(COMPACT_EVERY, max_new_tokens))
    start = torch.tensor([prompt.next_position for prompt in prompts], device=device).repeat_interleave(G)
    # The length stands first, since numpy takes [5, 0] and [5, 0, 0] for the same seed.
    seeds = [[len(key), *key, g] for key in keys for g in range(G)]
    uniform = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])  # in [0, 1)
    uniform = torch.from_numpy(uniform).to(device)  # (B * G, max_new_tokens) float64
    forbidden, eos = (torch.tensor(ids, device=device) for ids in (policy.forbidden_ids, policy.eos_ids))
    tokens = torch.zeros(B * G, max_new_tokens, dtype=torch.long, device=device)
    rows = torch.arange(B * G, device=device).view(B, G)  # the completion that each row of the batch holds
    for t in range(max_new_tokens):
        row = rows.flatten()
        tokens[row, t] = _sample(_policy_logits(logits, temperature, forbidden), uniform[row, t], temperature)
        if t + 1 == max_new_tokens:
            break
        if t and t % COMPACT_EVERY == 0:
            rows = _compact(rows, torch.isin(tokens[rows, : t + 1], eos).any(-1).cpu(), attention)
            if not len(rows):
                break
            attention.widen(min(t + COMPACT_EVERY, max_new_tokens))
            row = rows.flatten()
        logits = policy.run(_next_logits, tokens[row, t], start[row] + attention.step, attention)
    model.train(was_training)
    done = [_completion(policy, ids) for ids in tokens.tolist()]
    return [done[b * G : (b + 1) * G] for b in range(B)]


def _next_logits(model: nn.Module, tokens: Tensor, position: Tensor, attention: DecodeAttention) -> Tensor:
    """Return the logits (rows, V) of the tokens after these. tokens, position: (rows,)."""
    hidden = _hidden_states(model, tokens[:, None], position.expand(3, -1)[..., None], attention)
    attention.advance()
    return model.lm_head(hidden[:, 0])


def _compact(rows: Tensor, ended: Tensor, attention: DecodeAttention) -> Tensor:
    """Drop finished prompts, and finished completions as far as all prompts keep equally many. rows, ended:
    (B, G). Returns the rows that stay: (B', G')."""
    prompts = (~ended).any(1).nonzero().flatten()
    most = int((~ended).sum(1).max())
    completions = ended[prompts].int().argsort(dim=1, stable=True)[:, :most]  # unfinished ones first
    if completions.numel() == rows.numel():
        return rows
    attention.keep(prompts, completions)
    return rows[prompts[:, None], completions]


def _completion(policy: Policy, ids: list[int]) -> Completion:
    """Cut sampled tokens, which may go beyond the end token, there."""
    end = next((n for n, token in enumerate(ids) if token in policy.eos_ids), None)
    text = policy.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
    return Completion(ids if end is None else ids[: end + 1], text, truncated=end is None)


def _policy_logits(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Return the one distribution that is sampled from and scored: fp32, tempered, without placeholders."""
    return (logits.float() / (temperature or 1.0)).index_fill_(-1, forbidden, -torch.inf)


def _sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw a token a row, (rows, V) -> (rows,): inverse transform sampling with the row's uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


@dataclass
class PackedCompletions:
    """R completions of B prompts in one row of M tokens, one after the other, without padding."""

    prompts: list[Prompt]
    lengths: list[list[int]]  # of the completions of each prompt
    ids: Tensor  # (M,)
    positions: Tensor  # (3, M)
    # (M,) which of B + M hidden states predicts each token: the prompts' last ones come first, then the row's
    source: Tensor
    mask: Tensor  # (R, C) true on the tokens of a table padded to the longest completion's C


def pack_completions(
    policy: Policy, prompts: list[Prompt], completions: list[list[list[int]]]
) -> PackedCompletions:
    """Pack completions[b][g], the token ids of completion g of prompt b. None may be empty."""
    lengths = [[len(completion) for completion in group] for group in completions]
    sizes = [n for group in lengths for n in group]
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
        (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(policy.device),
    )


def completion_logprobs(
    policy: Policy,
    packed: PackedCompletions,
    temperature: float,
    caches: list[PromptCache] | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Compute the log-probability of every completion token under the policy that is sampled from: (R, C),
    0 on padding. Each prompt is computed once for its G completions, and no padding is.

    caches: of the prompts, if this policy has prefilled them; with gradients, if they are to be trained on.
    chunk: so many tokens at a time have a table of logits, in the backward pass too.
    """

    def packed_logprobs(model: nn.Module) -> Tensor:  # (M,)
        read = caches or _prefill(model, policy, packed.prompts)
        attention = AnswerAttention([cache.kv for cache in read], packed.lengths)
        hidden = _hidden_states(model, packed.ids[None], packed.positions[:, None], attention)[0]
        hidden = torch.cat([torch.stack([cache.last_hidden for cache in read]), hidden])  # (B + M, H)
        forbidden = torch.tensor(policy.forbidden_ids, device=hidden.device)

        def chunk_logprobs(hidden: Tensor, target: Tensor) -> Tensor:
            logits = _policy_logits(model.lm_head(hidden), temperature, forbidden)  # (chunk, V)
            return -F.cross_entropy(logits, target, reduction="none")

        ids = packed.ids.to(hidden.device)
        chunks = zip(hidden[packed.source].split(chunk), ids.split(chunk), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(chunk_logprobs, *c, use_reentrant=False) for c in chunks])
        return torch.cat([chunk_logprobs(*c) for c in chunks])

    logprobs = policy.run(packed_logprobs)
    return torch.zeros(packed.mask.shape, device=logprobs.device).masked_scatter(packed.mask, logprobs)
