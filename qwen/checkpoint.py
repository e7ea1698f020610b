"""A Hugging Face Qwen-VL checkpoint as a policy: load it, check what we rely on, save it.

Nothing in the network is changed. A checkpoint's files say nearly all that must be known, FAMILIES the rest;
where they contradict one another, or are of another model, load_policy says so with the value found.
"""

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import shutil
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.utils import cached_file, logging

from config import DTYPES, Config, ConfigError
from qwen import attention
from qwen.lora import add_adapters, base_of, has_adapters, load_adapters, write_adapters
from runtime import distributed
from runtime.files import ModelError
from video.frames import patchify

logging.disable_progress_bar()  # transformers' bars for loading and saving, between ours


@dataclass(frozen=True)
class Family:
    """What differs between the generations of Qwen-VL, and does not stand in the files of a checkpoint."""

    name: str
    model_class: type
    image_mean: tuple[float, ...]  # of its preprocessor's class: where the checkpoint does not say
    image_std: tuple[float, ...]
    # What tells the time of a frame: "index" | "seconds" (rotary position) | "text" (written in the prompt).
    timed: str
    budget_per: str  # what its pixel budget limits: h * w of a "frame" | T * h * w of a "video"
    coordinates: str  # in which it was pre-trained to write boxes, by their names in prompts.COORDINATES


_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FAMILIES = {  # by the model_type of config.json
    "qwen2_vl": Family(
        "Qwen2-VL", Qwen2VLForConditionalGeneration, *_CLIP, "index", "frame", coordinates="norm1000"
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", Qwen2_5_VLForConditionalGeneration, *_CLIP, "seconds", "frame", coordinates="resized"
    ),
    "qwen3_vl": Family(
        "Qwen3-VL", Qwen3VLForConditionalGeneration, *_HALF, "text", "video", coordinates="norm1000"
    ),
}
# Relatives that look as if they would do: why not.
REFUSED = {
    "qwen3_5": "Qwen3.5's linear-attention layers cannot score answers under a tree mask",
    "qwen3_5_moe": "Qwen3.5's linear-attention layers cannot score answers under a tree mask",
    "qwen3_vl_moe": "a mixture of experts, with which nothing here was tried",
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
    pixel_budget: tuple[float, float]  # fewest and most pixels of a family.budget_per that it was shown
    preprocessors: dict[str, dict]  # PREPROCESSORS as found, to be saved beside the trained model
    eos_ids: list[int]  # tokens that end an answer
    end_id: int  # the one of them that the true answers of supervised fine-tuning end with: <|im_end|>
    forbidden_ids: list[int]
    video_id: int  # <|video_pad|>
    compute: torch.dtype  # in which it computes, and is saved; weights that are trained may be in float32
    autocast: bool = False  # compute in bf16 with adapters in fp32 (FSDP2 does that by itself)

    def run(self, function: Callable, *arguments):
        """function(model, *arguments), for whatever enters the model otherwise than by its forward: a sharded
        one is only then whole at its root."""
        with self.arithmetic():
            return self.model.run(function, *arguments)

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """In which everything that the model computes must be computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The layers, in which nearly all weights are."""
        return [*self.model.model.visual.blocks, *self.model.model.language_model.layers]

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

# The files that say how videos are prepared. The first that does is the one that counts, as in transformers:
# saves of its release 5 (under the key "video_processor"), Qwen3-VL's for videos, the older ones for both.
PREPROCESSORS = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
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


@contextlib.contextmanager
def _loading(checkpoint: str):
    try:
        yield
    except ModelError:
        raise
    except BROKEN as error:
        raise ModelError(
            f"model: {checkpoint!r} does not load: {_reason(error)}; fetch its files again"
        ) from error


@_quiet()
def load_tokenizer(checkpoint: str) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a checkpoint, and its Policy.size_factor, without its weights. Raises ModelError."""
    checkpoint = base_of(checkpoint)
    with _loading(checkpoint):
        vision = AutoConfig.from_pretrained(checkpoint).vision_config
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer, vision.patch_size * vision.spatial_merge_size


def load_policy(checkpoint: str, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> Policy:
    """A policy from a local folder or a hub id, or from a folder of adapters (adapters.py) and their base.

    dtype: of its weights; "auto": as in the files. Raises ModelError where it is no Qwen-VL that we can
    train, where its files contradict one another, or where it does not load.
    """
    base = base_of(checkpoint)
    if base == checkpoint:
        return _load_whole(checkpoint, dtype, device)
    try:
        policy = _load_whole(base, dtype, device)
    except ModelError as error:
        raise ModelError(
            f"{error} (the base of the adapters in {checkpoint!r}: base_model_name_or_path in their"
            " adapter_config.json)"
        ) from error
    with _loading(checkpoint):
        load_adapters(policy, checkpoint)
    return policy


@_quiet()
def _load_whole(checkpoint: str, dtype: torch.dtype | str, device: str) -> Policy:
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except BROKEN as error:
        raise ModelError(
            f"model: {checkpoint!r} is neither a checkpoint folder (with a config.json) nor a known hub id:"
            f" {_reason(error)}; name a folder with a good config.json, or a hub id such as {EXAMPLE}"
        ) from error
    if config.model_type not in FAMILIES:
        hint = f" ({REFUSED[config.model_type]})" if config.model_type in REFUSED else ""
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
    preprocessors = _read_json(checkpoint, PREPROCESSORS)
    video = _video_settings(preprocessors)
    # transformers passes over a broken one in silence, and an end of the answer would be forgotten.
    generation = _read_json(checkpoint, ("generation_config.json",)).get("generation_config.json", {})
    with _loading(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Before the weights, which can take minutes.
    for problem in _problems(config, tokenizer, video, generation):
        raise ModelError(f"model: {checkpoint!r}: {problem}")
    with _loading(checkpoint):
        model, found = family.model_class.from_pretrained(
            checkpoint,
            dtype=dtype,
            attn_implementation={
                "": "sdpa",
                "text_config": attention.IMPLEMENTATION,
                "vision_config": "sdpa",
            },
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    random = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if random:
        raise ModelError(
            f"model: {checkpoint!r}: its weights do not fit its config.json: {len(random)} of them would stay"
            f" random, such as {random[0]}; fetch its files again"
        )
    speed_up(model)
    model.run = types.MethodType(_run, model)
    vision, vocabulary = config.vision_config, tokenizer.get_vocab()
    return Policy(
        model=model.to(device),
        tokenizer=tokenizer,
        family=family,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        image_mean=tuple(video.get("image_mean", family.image_mean)),
        image_std=tuple(video.get("image_std", family.image_std)),
        pixel_budget=_pixel_budget(video),
        preprocessors=preprocessors,
        eos_ids=_eos_ids(model.generation_config, tokenizer),
        end_id=vocabulary["<|im_end|>"],
        forbidden_ids=[vocabulary[token] for token in FORBIDDEN_TOKENS if token in vocabulary],
        video_id=vocabulary["<|video_pad|>"],
        compute=model.dtype,
    )


def _run(self, function: Callable, *arguments):
    """A method of the model, so that FSDP2 can treat it as its forward (distributed.shard)."""
    return function(self, *arguments)


VISION_ATTENTION = (
    qwen2_vl.VisionAttention,
    qwen2_5_vl.Qwen2_5_VLVisionAttention,
    qwen3_vl.Qwen3VLVisionAttention,
)
PATCH_EMBED = (qwen2_vl.PatchEmbed, qwen2_5_vl.Qwen2_5_VisionPatchEmbed, qwen3_vl.Qwen3VLVisionPatchEmbed)
RMS_NORM = (qwen2_vl.Qwen2VLRMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm)


def speed_up(model: torch.nn.Module) -> None:
    """The model without three detours; the same numbers, up to rounding.

    The vision tower's attention calls its kernel once for each distinct size of window or frame, not in a
    Python loop over all of them; its patch embedding, a convolution whose stride is its kernel, becomes the
    matrix product that it is; a norm is one call, not seven.
    """
    for module in model.modules():
        if isinstance(module, RMS_NORM):
            module.forward = types.MethodType(_rms_norm, module)
        elif isinstance(module, VISION_ATTENTION):
            module.forward = types.MethodType(_window_attention, module)
        elif isinstance(module, PATCH_EMBED):
            module.forward = types.MethodType(_embed_patches, module)


def _rms_norm(self, hidden_states):
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _window_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """hidden_states: (n, H), windows one after the other; cu_seqlens: where they begin, and n."""
    n = len(hidden_states)
    q, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)  # (n, heads, d)
    q, k = qwen2_5_vl.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths = cu_seqlens.diff()
    window_length = lengths.repeat_interleave(lengths)  # (n,) of the window that each patch is in
    distinct, out = lengths.unique().tolist(), torch.empty_like(q)
    for length in distinct:
        rows = window_length == length if len(distinct) > 1 else slice(None)  # a slice copies nothing
        windows = [x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]  # (w, heads, l, d)
        out[rows] = F.scaled_dot_product_attention(*windows).transpose(1, 2).flatten(0, 1)
    return self.proj(out.flatten(1))


def _embed_patches(self, hidden_states):
    return F.linear(hidden_states.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


# ----------------------------------------------------------------------------------------------------------
# The two policies of training


def freeze(policy: Policy, config: Config) -> Policy:
    """The reference of the KL: a copy that never changes."""
    if not distributed.is_sharded(policy.model):
        model = copy.deepcopy(policy.model).requires_grad_(False).eval()
        return dataclasses.replace(policy, model=model)
    reference = load_policy(config.model, dtype="auto")  # a sharded model cannot be copied
    reference.model.requires_grad_(False).eval()
    distributed.shard(reference.model, reference.blocks, compute_dtype(config))
    with torch.no_grad():
        for ours, theirs in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
            ours.to_local().copy_(theirs.to_local())
    return reference


def load_trainable(config: Config) -> Policy:
    """The checkpoint of a configuration on this rank's device, with what is trained in fp32, and what is not
    (all but the adapters, or the vision tower) frozen."""
    policy = load_policy(config.model, dtype="auto")
    if config.lora.rank:
        add_adapters(policy, config.lora, config.seed)
    elif has_adapters(policy):
        raise ConfigError(f"model: {config.model} holds adapters; set lora.rank, and model to their base")
    elif config.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    compute, (_, ranks) = compute_dtype(config), distributed.init()
    policy = dataclasses.replace(policy, compute=compute)
    if ranks > 1 or (compute != torch.float32 and not config.lora.rank):
        distributed.shard(policy.model, policy.blocks, compute)
        return policy
    distributed.to_device(policy.model, compute)
    return dataclasses.replace(policy, autocast=compute != torch.float32)  # for the adapters, in fp32


def compute_dtype(config: Config) -> torch.dtype:
    return getattr(torch, DTYPES[config.precision])


# ----------------------------------------------------------------------------------------------------------
# Saving: all ranks call these together, and the first one writes


def save_policy(policy: Policy, folder: Path) -> None:
    """write_policy into a folder that appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed

    distributed.on_rank0(begin)
    try:
        write_policy(policy, temporary)
    except ModelError:
        distributed.on_rank0(begin)
        raise
    distributed.on_rank0(lambda: temporary.rename(folder))


def write_policy(policy: Policy, folder: Path) -> None:
    """Write a checkpoint into a folder, made where it is not there: what from_pretrained reads, in the dtype
    that the policy computes in; of a policy with adapters only these, as peft reads them. Raises ModelError,
    on every rank, where it cannot be written."""
    adapted = has_adapters(policy)
    dtype = torch.float32 if adapted else policy.compute
    state = distributed.full_state(policy.model, dtype, trained_only=adapted)

    def write() -> None:
        try:
            _write_files(policy, state, folder)
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            place = str(folder).removesuffix(".tmp")  # under which it is filled
            message = f"{place}: cannot be written ({reason}); free some space, or save elsewhere"
            raise ModelError(message) from error

    distributed.on_rank0(write)


def _write_files(policy: Policy, state: dict[str, torch.Tensor], folder: Path) -> None:
    """state: name -> whole tensor, of the adapters or of everything."""
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapters(policy):
        write_adapters(policy, state, folder)
    else:
        # Through a twin of the stock class without weights: a sharded model cannot save itself.
        config = copy.deepcopy(policy.model.config)
        with torch.device("meta"):
            twin = policy.family.model_class._from_config(config, dtype=policy.compute)
        twin.generation_config = policy.model.generation_config
        for name in twin.all_tied_weights_keys:  # FSDP2 gathers a tied tensor twice
            state.pop(name, None)
        twin.save_pretrained(folder, state_dict=state)
    policy.tokenizer.save_pretrained(folder)
    for name, content in policy.preprocessors.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message, of which there may be none."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]]).rstrip(".: ")


def _read_json(checkpoint: str, names: tuple[str, ...]) -> dict[str, dict]:
    """Those of the named files that a checkpoint folder or hub repository has. Raises ModelError for a broken
    one."""
    found = {}
    for name in names:
        path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        try:
            found[name] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(
                f"model: {checkpoint!r}: its {name} cannot be read ({_reason(error)}); fetch it again"
            ) from error
        if not isinstance(found[name], dict):
            raise ModelError(f"model: {checkpoint!r}: its {name} is no JSON object; fetch it again")
    return found


def _video_settings(preprocessors: dict[str, dict]) -> dict:
    """What the file that counts says of videos; {} where there is none. As in transformers, what that file
    leaves out is not looked up in the others."""
    nested = preprocessors.get("processor_config.json", {}).get("video_processor")
    flat = (preprocessors[name] for name in PREPROCESSORS[1:] if name in preprocessors)
    return nested if isinstance(nested, dict) else next(flat, {})


def _pixel_budget(video: dict) -> tuple[float, float]:
    """Fewest and most pixels, in any of the ways of saying it; no limit where nothing is said. (transformers
    would then take the limits of its class, from 100,352 pixels, which no published checkpoint names.)"""
    size = video.get("size") or {}

    def first(*values):
        return next(value for value in values if value is not None)

    return (
        first(video.get("min_pixels"), size.get("min_pixels"), size.get("shortest_edge"), 0),
        first(video.get("max_pixels"), size.get("max_pixels"), size.get("longest_edge"), math.inf),
    )


def _problems(config: PreTrainedConfig, tokenizer, video: dict, generation: dict) -> Iterator[str]:
    """Where a checkpoint's files are not what our prompts, patches and samples rely on: what was found, and
    what to do. The first one counts, others may follow from it.

    video, generation: the settings of its preprocessor and its generation_config.json.
    """
    vision, vocabulary = config.vision_config, tokenizer.get_vocab()
    again = "fetch its files again"
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for key, size in sizes.items():
        if video.get(key, size) != size:
            yield f"{key} is {video[key]!r} in its preprocessor, but {size!r} in its config.json; {again}"
    for key in ("image_mean", "image_std"):
        match video.get(key, [0, 0, 0]):
            case [int() | float(), int() | float(), int() | float()]:
                continue
        yield f"{key} in its preprocessor is {video[key]!r}, not [red, green, blue] in numbers; {again}"
    budget = _pixel_budget(video) if isinstance(video.get("size"), dict | None) else None
    match budget:
        case (int() | float() as low, int() | float() as high) if 0 <= low <= high:
            pass
        case _:
            said = {key: video[key] for key in ("min_pixels", "max_pixels", "size") if key in video}
            yield f"its preprocessor says {said}, which is no range of pixels; {again}"
    if FAMILIES[config.model_type].timed == "seconds" and not vision.tokens_per_second > 0:
        yield f"tokens_per_second in its config.json is {vision.tokens_per_second!r}, not above 0; {again}"

    shipped = "use the one shipped with Qwen-VL"
    marks = {
        "<|video_pad|>": "video_token_id",
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
    }
    missing = [token for token in (*marks, "<|im_end|>") if token not in vocabulary]
    if missing:
        yield f"the tokenizer lacks the tokens {', '.join(missing)}; {shipped}"
    ids, ends = set(vocabulary.values()), generation.get("eos_token_id")
    if not all(end is None or (type(end) is int and end in ids) for end in _as_list(ends)):
        yield f"eos_token_id in its generation_config.json is {ends!r}, not tokens of its tokenizer; {again}"
    if max(ids) >= config.text_config.vocab_size:
        rows = config.text_config.vocab_size
        yield f"vocab_size in its config.json is {rows}, but its tokenizer goes up to {max(ids)}; {again}"
    for token, key in marks.items():
        if vocabulary[token] != getattr(config, key):
            yield (
                f"{key} in its config.json is {getattr(config, key)!r}, but {token} is {vocabulary[token]} in"
                f" its tokenizer; {again}"
            )
    if tokenizer.chat_template is None:
        yield f"the tokenizer lacks a chat template; {shipped}"
    try:
        chat = render_chat(tokenizer, "What happens?")
    except (*BROKEN, TemplateError) as error:  # of a model that knows no videos, for example
        yield f"its chat template cannot render a video ({_reason(error)}); {shipped}"
    before, block, after = chat.partition(VIDEO_BLOCK)
    one_block = block and "<|video_pad|>" not in before + after
    # The templates of "Thinking" checkpoints open a <think> after that: no answer of ours begins so.
    if not (one_block and "What happens?" in after and after.endswith("<|im_start|>assistant\n")):
        yield (
            f"its chat template renders {chat!r}, not one {VIDEO_BLOCK}, the text, and"
            " '<|im_start|>assistant\\n' at the end; use the one shipped with an Instruct checkpoint"
        )


def render_chat(tokenizer, text: str) -> str:
    """What the user says about a video, up to where the answer begins, with one <|video_pad|> for it."""
    content = [{"type": "video", "video": ""}, {"type": "text", "text": text}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _eos_ids(generation_config: GenerationConfig, tokenizer) -> list[int]:
    """All tokens that end an answer (Qwen-VL has two). Nothing else of the generation config is used: its
    repetition penalty and top-k would make the sampler another policy than the one that is scored."""
    eos = set(_as_list(generation_config.eos_token_id)) - {None}
    return sorted(eos | {tokenizer.convert_tokens_to_ids("<|im_end|>")})
