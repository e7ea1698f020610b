"""A Hugging Face Qwen-VL as a policy: load it, encode a prompt, sample answers, score answers.

Nothing in the network is changed. Three things are done our way, since the obvious way is wrong or slow:
  * 3-D rotary positions are computed here and passed to every call (rope_positions says why);
  * sampling encodes the prompt, vision tower included, once and expands its KV cache to the G answers
    (rollout);
  * scoring runs the G answers of a prompt in one packed forward with a tree attention mask
    (completion_logprobs).
"""

import contextlib
import json
import pickle
import shutil
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.utils import cached_file, logging

from data import Sample
from prompts import TextFormat, build_prompt
from video import frame_size, patchify, read_clip, resize

logging.disable_progress_bar()  # transformers' bars for loading and saving, between ours


class ModelError(ValueError):
    """A checkpoint that cannot serve as the policy; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Family:
    """What differs between the generations of Qwen-VL."""

    model_class: type
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    # What tells the time of a frame: "index" | "seconds" (rotary position) | "text" (written in the prompt).
    timed: str


_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FAMILIES = {
    "qwen2_vl": Family(Qwen2VLForConditionalGeneration, *_CLIP, timed="index"),
    "qwen2_5_vl": Family(Qwen2_5_VLForConditionalGeneration, *_CLIP, timed="seconds"),
    "qwen3_vl": Family(Qwen3VLForConditionalGeneration, *_HALF, timed="text"),
}
# Never sampled, never scored: in a completion they would ask the vision tower for features of nothing.
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
EXAMPLE = "Qwen/Qwen2.5-VL-7B-Instruct"  # of a checkpoint, in error messages
VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass
class Policy:
    model: torch.nn.Module
    tokenizer: object
    family: Family
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    preprocessor: dict  # preprocessor_config.json as found, to be saved beside the trained model
    eos_ids: list[int]  # tokens that end an answer
    end_id: int  # the one of them that the true answers of supervised fine-tuning end with: <|im_end|>
    forbidden_ids: list[int]
    video_id: int  # <|video_pad|>

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def size_factor(self) -> int:
        """Sides of the frames must be multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def patches(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames (T, h, w, 3) uint8 -> what the vision tower takes: pixel values (N, D), their grid (3,)."""
        sizes = (self.patch_size, self.merge_size, self.temporal_patch_size)
        return patchify(frames, *sizes, self.image_mean, self.image_std)


# ----------------------------------------------------------------------------------------------------------
# Loading

# What transformers and torch raise for a broken folder depends on which of its files is broken, and how.
BROKEN = (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, EOFError, ImportError)
BROKEN += (pickle.UnpicklingError, SafetensorError, StrictDataclassError)


@contextlib.contextmanager
def _quiet():
    """transformers and the hub's client report in many lines what we say in one."""
    loggers = [logging.get_logger("transformers"), logging.get_logger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@_quiet()
def load_policy(checkpoint: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Policy:
    """A policy from a local folder or a hub id. Raises ModelError where it is no Qwen-VL that we can train,
    or does not load."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except BROKEN as error:
        raise ModelError(
            f"model: {checkpoint!r} is neither a checkpoint folder (with a config.json) nor a known hub id:"
            f" {_reason(error)}; name a folder with a good config.json, or a hub id such as {EXAMPLE}"
        ) from error
    if config.model_type not in FAMILIES:
        hint = ""
        if config.model_type.startswith("qwen3_5"):
            hint = " (Qwen3.5's linear-attention layers cannot score answers under a tree mask)"
        raise ModelError(
            f"model: {checkpoint!r} is a {config.model_type!r}{hint}; use one of {', '.join(FAMILIES)},"
            f" for example {EXAMPLE}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model: {checkpoint!r} is quantized, and such weights cannot be trained; use the original, for"
            f" example {EXAMPLE}"
        )
    family = FAMILIES[config.model_type]
    try:
        # sdpa: the eager path misreads boolean masks, flash attention cannot take a tree mask at all.
        model, found = family.model_class.from_pretrained(
            checkpoint,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except BROKEN as error:
        raise ModelError(
            f"model: {checkpoint!r} does not load: {_reason(error)}; fetch its files again"
        ) from error
    random = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if random:
        raise ModelError(
            f"model: {checkpoint!r}: its weights do not fit its config.json: {len(random)} of them would stay"
            f" random, such as {random[0]}; fetch its files again"
        )
    speed_up_vision(model)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ("<|video_pad|>", "<|im_end|>") if token not in vocabulary]
    if missing or tokenizer.chat_template is None:
        what = f"the tokens {', '.join(missing)}" if missing else "a chat template"
        raise ModelError(
            f"model: {checkpoint!r}: the tokenizer lacks {what}; use the one shipped with Qwen-VL"
        )
    vision, preprocessor = config.vision_config, _read_preprocessor(checkpoint)
    return Policy(
        model=model.to(device),
        tokenizer=tokenizer,
        family=family,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        image_mean=tuple(preprocessor.get("image_mean", family.image_mean)),
        image_std=tuple(preprocessor.get("image_std", family.image_std)),
        preprocessor=preprocessor,
        eos_ids=_eos_ids(model.generation_config, tokenizer),
        end_id=vocabulary["<|im_end|>"],
        forbidden_ids=[vocabulary[token] for token in FORBIDDEN_TOKENS if token in vocabulary],
        video_id=vocabulary["<|video_pad|>"],
    )


def speed_up_vision(model: torch.nn.Module) -> None:
    """Qwen2.5-VL's vision tower without two detours that are slow on a CPU; the same numbers, up to rounding.

    Attention calls its kernel once for each distinct size of window, not in a Python loop over all windows;
    the patch embedding, a convolution whose stride is its kernel, becomes the matrix product that it is.
    """
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLVisionAttention):
            module.forward = types.MethodType(_window_attention, module)
        elif isinstance(module, Qwen2_5_VisionPatchEmbed):
            module.forward = types.MethodType(_embed_patches, module)


def _window_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """hidden_states: (n, H), windows one after the other; cu_seqlens: where they begin, and n."""
    n = len(hidden_states)
    q, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)  # (n, heads, d)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths = cu_seqlens.diff()
    window_length = lengths.repeat_interleave(lengths)  # (n,) of the window that each patch is in
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        rows = window_length == length
        windows = [x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]  # (w, heads, l, d)
        out[rows] = F.scaled_dot_product_attention(*windows).transpose(1, 2).flatten(0, 1)
    return self.proj(out.flatten(1))


def _embed_patches(self, hidden_states):
    return F.linear(hidden_states.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a checkpoint folder that from_pretrained reads; whole or not at all. Raises ModelError where it
    cannot be written."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        policy.model.save_pretrained(temporary)
        policy.tokenizer.save_pretrained(temporary)
        if policy.preprocessor:
            text = json.dumps(policy.preprocessor, indent=2) + "\n"
            (temporary / "preprocessor_config.json").write_text(text, encoding="utf-8")
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{folder}: cannot be written ({reason}); free some space, or save elsewhere"
        ) from error


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message, of which there may be none."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]]).rstrip(".: ")


def _read_preprocessor(checkpoint: str) -> dict:
    """preprocessor_config.json of a checkpoint folder or hub repository; {} where there is none. Raises
    ModelError for a broken file, and for colours that are not three numbers."""
    name = "preprocessor_config.json"
    path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
    try:
        preprocessor = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"model: {checkpoint!r}: its {name} cannot be read ({_reason(error)}); fetch it again"
        ) from error
    if not isinstance(preprocessor, dict):
        raise ModelError(f"model: {checkpoint!r}: its {name} is no JSON object; fetch it again")
    for key in ("image_mean", "image_std"):
        match preprocessor.get(key, [0, 0, 0]):
            case [int() | float(), int() | float(), int() | float()]:
                continue
        raise ModelError(
            f"model: {checkpoint!r}: {key} in its {name} is not [red, green, blue] in numbers; fetch it again"
        )
    return preprocessor


def _eos_ids(generation_config: GenerationConfig, tokenizer) -> list[int]:
    """All tokens that end an answer (Qwen-VL has two). Nothing else of the generation config is used: its
    repetition penalty and top-k would make the sampler another policy than the one that is scored."""
    eos = generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos]) - {None}
    return sorted(eos | {tokenizer.convert_tokens_to_ids("<|im_end|>")})


# ----------------------------------------------------------------------------------------------------------
# The prompt


@dataclass
class Prompt:
    """All that the model sees before it answers."""

    ids: torch.Tensor  # (P,) long
    positions: torch.Tensor  # (3, P) long: rotary positions in time, height and width
    frames: torch.Tensor  # (T, h, w, 3) uint8; cut into patches when they are needed, a 16th of the memory
    scale: tuple[int, int]  # (width, height) that the boxes of its answers are measured in

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


def make_prompt(policy: Policy, sample: Sample, max_side: int, text_format: TextFormat) -> Prompt:
    """A sample -> what the model is shown. Sampling and scoring, training and evaluation all come through
    here. Raises ModelError or VideoError."""
    file_size = (sample.width, sample.height)
    shown_size = frame_size(*file_size, max_side, policy.size_factor)
    times = [i / text_format.fps for i in range(sample.grid(1 / text_format.fps).num_steps)]
    frames = resize(read_clip(sample, times), shown_size)
    scale = text_format.scale(shown_size, file_size)
    num_steps = sample.grid(text_format.step_seconds).num_steps
    return encode_prompt(
        policy, frames, build_prompt(sample.sentence, num_steps, scale, text_format), scale, text_format.fps
    )


def encode_prompt(
    policy: Policy, frames: torch.Tensor, text: str, scale: tuple[int, int], fps: float
) -> Prompt:
    """frames: (T, h, w, 3) uint8, fps of them a second, sides multiples of policy.size_factor. text: what the
    user says about them. scale: as in Prompt. Raises ModelError for a text with special tokens."""
    if "<|" in text:
        raise ModelError(f"the text {text!r} holds '<|', the mark of Qwen's special tokens: remove it")
    t = -(-len(frames) // policy.temporal_patch_size)
    h, w = frames.shape[1] // policy.size_factor, frames.shape[2] // policy.size_factor
    seconds_per_grid = policy.temporal_patch_size / fps

    content = [{"type": "video", "video": ""}, {"type": "text", "text": text}]
    chat = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pads = "<|video_pad|>" * (h * w)
    if policy.family.timed == "text":
        # Qwen3-VL: a block for each temporal patch, after the mean time of its frames, not one for all.
        times = [i * seconds_per_grid + (policy.temporal_patch_size - 1) / (2 * fps) for i in range(t)]
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


def _visual_inputs(policy: Policy, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """The patches of all prompts, one after the other, and the (t, h, w) of each."""
    patches = [policy.patches(prompt.frames) for prompt in prompts]
    return {
        "pixel_values_videos": torch.cat([values for values, _ in patches]).to(policy.device),
        "video_grid_thw": torch.stack([grid for _, grid in patches]).to(policy.device),
    }


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
) -> list[list[Completion]]:
    """Sample num_generations (G) answers to each of B prompts, at temperature 0 the single greedy one.

    keys: for each prompt a tuple of non-negative integers, such as (seed, step, number of the prompt): answer
    g draws its random numbers from its key and g, so it is the same whoever else is in the batch. Keys of
    different length, as of training and evaluation, never give the same numbers. The prompts are encoded
    once, in one padded batch; their KV cache is then expanded to B * G rows, which leave it as they end.
    """
    model, device, G = policy.model, policy.device, num_generations
    was_training = model.training
    # In training mode gradient checkpointing drops the KV cache and the samples are silently wrong.
    model.eval()
    rows, lengths = len(prompts) * G, [len(p.ids) for p in prompts]
    P, total = max(lengths), max(lengths) + max_new_tokens

    # Padded on the right, so that no row is without a key.
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), P, dtype=torch.long)
    real = torch.ones(len(prompts), total, dtype=torch.bool)  # keys that may be seen
    for b, prompt in enumerate(prompts):
        ids[b, : lengths[b]], positions[:, b, : lengths[b]] = prompt.ids, prompt.positions
        real[b, lengths[b] : P] = False
    out = model.model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        use_cache=True,
        **_visual_inputs(policy, prompts),
    )
    last = out.last_hidden_state[torch.arange(len(prompts)), torch.tensor(lengths) - 1]  # (B, H)
    logits, cache = model.lm_head(last).repeat_interleave(G, 0), out.past_key_values  # (B * G, V)
    cache.batch_repeat_interleave(G)
    real = real.repeat_interleave(G, 0).to(device)
    position = torch.tensor([p.next_position for p in prompts], device=device)
    position = position.repeat_interleave(G)  # (B * G,)
    # The length stands first, since numpy takes [5, 0] and [5, 0, 0] for the same seed.
    seeds = [[len(key), *key, g] for key in keys for g in range(G)]
    uniform = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
    uniform = torch.tensor(uniform, device=device)  # (B * G, max_new_tokens)

    eos = torch.tensor(policy.eos_ids, device=device)
    alive = torch.arange(rows, device=device)  # which answer each row of the cache belongs to
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    ended = torch.full((rows,), max_new_tokens, device=device)  # length of each answer, end token included
    for t in range(max_new_tokens):
        logits = _policy_logits(logits, temperature, policy)  # (rows, V)
        sampled = _sample(logits, uniform[alive, t], temperature)  # (rows,)
        tokens[alive, t] = sampled
        stop = torch.isin(sampled, eos)
        ended[alive[stop]] = t + 1
        if stop.any():
            keep = (~stop).nonzero().flatten()
            if len(keep) == 0:
                break
            alive, sampled = alive[keep], sampled[keep]
            cache.batch_select_indices(keep)
        if t + 1 == max_new_tokens:
            break
        out = model(
            input_ids=sampled[:, None],
            position_ids=(position[alive] + t).expand(3, -1)[..., None],
            attention_mask=real[alive, None, None, : P + t + 1],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    model.train(was_training)

    tokens, ended = tokens.tolist(), ended.tolist()
    done = []
    for row in range(rows):
        row_ids = tokens[row][: ended[row]]
        whole = row_ids[-1] in policy.eos_ids
        text = policy.tokenizer.decode(row_ids[:-1] if whole else row_ids, clean_up_tokenization_spaces=False)
        done.append(Completion(row_ids, text, truncated=not whole))
    return [done[b * G : (b + 1) * G] for b in range(len(prompts))]


def _policy_logits(logits: torch.Tensor, temperature: float, policy: Policy) -> torch.Tensor:
    """The one distribution that is sampled from and scored: fp32, at the temperature, no placeholders."""
    logits = logits.float() / (temperature or 1.0)
    return logits.index_fill(-1, torch.tensor(policy.forbidden_ids, device=logits.device), -torch.inf)


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
class TreeBatch:
    """B prompts with their completions, packed for scoring: row b is [prompt b, completion 1, ...,
    completion G], padded on the right to N tokens. The completions, R in all, do not see one another."""

    inputs: dict[str, torch.Tensor]
    source: torch.Tensor  # (M,) of the B * N places, the one whose state predicts each token
    target: torch.Tensor  # (M,) the token: all tokens of all R completions, one after the other
    mask: torch.Tensor  # (R, C) which places of a padded table of completions are tokens


def pack_completions(policy: Policy, prompts: list[Prompt], completions: list[list[list[int]]]) -> TreeBatch:
    """completions[b][g]: token ids of answer g to prompt b. None may be empty."""
    device = policy.device
    N = max(len(p.ids) + sum(map(len, group)) for p, group in zip(prompts, completions, strict=True))
    ids = torch.zeros(len(prompts), N, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), N, dtype=torch.long)
    segment = torch.full((len(prompts), N), -1)  # 0: the prompt, g: completion g, -1: padding
    source, target = [], []
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        P = k = len(prompt.ids)
        ids[b, :P], positions[:, b, :P], segment[b, :P] = prompt.ids, prompt.positions, 0
        for g, completion in enumerate(group):
            n = len(completion)
            ids[b, k : k + n] = torch.tensor(completion)
            positions[:, b, k : k + n] = prompt.next_position + torch.arange(n)
            segment[b, k : k + n] = g + 1
            source += [b * N + P - 1, *range(b * N + k, b * N + k + n - 1)]  # the first follows the prompt
            target += completion
            k += n
    i = torch.arange(N)
    causal = i[:, None] >= i[None, :]  # (N, N)
    related = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])  # (B, N, N)
    inputs = {
        "input_ids": ids.to(device),
        "position_ids": positions.to(device),
        "attention_mask": (causal & related)[:, None].to(device),
        **_visual_inputs(policy, prompts),
    }
    mask = completion_mask([len(completion) for group in completions for completion in group])
    return TreeBatch(
        inputs, torch.tensor(source, device=device), torch.tensor(target, device=device), mask.to(device)
    )


def completion_mask(lengths: list[int]) -> torch.Tensor:
    """(R, C) true on the tokens of R completions in a table that is padded to the longest one's C."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def completion_logprobs(
    policy: Policy, batch: TreeBatch, temperature: float, chunk: int = 1024
) -> torch.Tensor:
    """Log-probability of every completion token under the policy that is sampled from: (R, C), 0 on padding.

    One forward over the packed rows. Each prompt is encoded once for its G answers, and the (M, V) table of
    logits exists only a chunk of tokens at a time, in the backward pass too.
    """
    hidden = policy.model.model(**batch.inputs, use_cache=False).last_hidden_state  # (B, N, H)
    hidden = hidden.flatten(0, 1)[batch.source]  # (M, H)

    def chunk_logprobs(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = _policy_logits(policy.model.lm_head(states), temperature, policy)  # (chunk, V)
        return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)

    chunks = zip(hidden.split(chunk), batch.target.split(chunk), strict=True)
    if torch.is_grad_enabled():
        logprobs = torch.cat([checkpoint(chunk_logprobs, s, t, use_reentrant=False) for s, t in chunks])
    else:
        logprobs = torch.cat([chunk_logprobs(s, t) for s, t in chunks])
    return torch.zeros(batch.mask.shape, device=hidden.device).masked_scatter(batch.mask, logprobs)
