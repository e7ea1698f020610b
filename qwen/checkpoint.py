"""Load, check and save a Hugging Face Qwen-VL checkpoint as a policy; make the two policies of training.

A checkpoint's files say nearly everything, FAMILIES the rest. Files that would make training wrong in silence
are refused with the value found.
"""

import contextlib
import copy
import dataclasses
import json
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from config import DTYPES, Config, ConfigError
from qwen.attention import IMPLEMENTATION
from qwen.inputs import QUESTION, VIDEO_BLOCK, render_chat
from qwen.lora import SETTINGS, add_adapters, base_of, import_peft, save_adapters
from qwen.speed import speed_up
from runtime import distributed
from runtime.files import ModelError, disk_remedy
from video.frames import patchify

logging.disable_progress_bar()
logging.set_verbosity_error()  # transformers and the hub's client report in many lines what we say in one
logging.get_logger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Family:
    """What differs between the generations of Qwen-VL and does not stand in a checkpoint's files."""

    name: str
    model_class: type
    image_mean: tuple[float, ...]  # of its preprocessor's class, for a checkpoint that does not say
    image_std: tuple[float, ...]
    timed: str  # what tells a frame's time: "index" | "seconds" (rotary position) | "text" (in the prompt)
    coordinates: str  # in which it was pre-trained to write boxes: a name of prompts.COORDINATES


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
QWEN2 = "Qwen2-VL", transformers.Qwen2VLForConditionalGeneration
QWEN2_5 = "Qwen2.5-VL", transformers.Qwen2_5_VLForConditionalGeneration
QWEN3 = "Qwen3-VL", transformers.Qwen3VLForConditionalGeneration
FAMILIES = {  # by the model_type of config.json
    "qwen2_vl": Family(*QWEN2, *CLIP, timed="index", coordinates="norm1000"),
    "qwen2_5_vl": Family(*QWEN2_5, *CLIP, timed="seconds", coordinates="resized"),
    "qwen3_vl": Family(*QWEN3, *HALF, timed="text", coordinates="norm1000"),
}
# Never sampled, never scored: in a completion they would ask the vision tower for features of nothing.
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
EXAMPLE = "Qwen/Qwen2.5-VL-7B-Instruct"  # of a checkpoint, in error messages
TOKEN_IDS = {  # by their names in config.json
    "vision_start_token_id": "<|vision_start|>",
    "video_token_id": "<|video_pad|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass
class Policy:
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    family: Family
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    preprocessors: dict[str, dict]  # PREPROCESSORS as found, to be saved beside the trained model
    eos_ids: list[int]  # tokens that end an answer
    end_id: int  # the one that ends the true answers of supervised fine-tuning: <|im_end|>
    forbidden_ids: list[int]
    video_id: int  # <|video_pad|>
    compute: torch.dtype  # dtype of the arithmetic and of saved weights; trained weights may be in float32
    autocast: bool = False  # compute in bf16 with adapters in fp32 (FSDP2 does that by itself)

    def run(self, function: Callable, *arguments):
        """Call function(model, *arguments). Only within it may the parts of a model be called: a sharded
        model gathers its root for it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model.run(function, *arguments)

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The layers, which hold nearly all weights."""
        return [*self.model.model.visual.blocks, *self.model.model.language_model.layers]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def size_factor(self) -> int:
        """Sides of the frames must be multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def patches(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut frames (T, h, w, 3) uint8 into the tower's inputs: pixel values (N, D) and their grid (3,)."""
        sizes = (self.patch_size, self.merge_size, self.temporal_patch_size)
        return patchify(frames, *sizes, self.image_mean, self.image_std)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder that from_pretrained reads, in the dtype of the arithmetic; of a policy
        with adapters these alone, as peft reads them. All ranks call it, rank 0 writes. Raises ModelError, on
        every rank, if it cannot be written."""
        dtype = torch.float32 if self.has_adapters else self.compute
        state = distributed.full_state(self.model, dtype, trained_only=self.has_adapters)  # name -> tensor

        def write() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if self.has_adapters:
                    save_adapters(self.model, state, folder)
                else:
                    # Through a twin of the stock class without weights: a sharded model cannot save itself.
                    config = copy.deepcopy(self.model.config)
                    with torch.device("meta"):
                        twin = self.family.model_class._from_config(config, dtype=self.compute)
                    twin.generation_config = self.model.generation_config
                    for name in twin.all_tied_weights_keys:  # FSDP2 gathers a tied tensor twice
                        state.pop(name, None)
                    twin.save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)
                for name, content in self.preprocessors.items():
                    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            except (OSError, SafetensorError) as error:
                place = str(folder).removesuffix(".tmp")  # the name that it gets when it is complete
                why = f"cannot be written ({_reason(error)}); {disk_remedy(error)}"
                raise ModelError(f"{place}: {why}") from error

        distributed.on_rank0(write)


# The files that say how videos are prepared. The first one found counts as a whole, as in transformers: saves
# of its release 5 (under the key "video_processor"), Qwen3-VL's for videos, the older one for both.
PREPROCESSORS = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
# What transformers and torch raise for a damaged folder depends on the file and on the damage.
BROKEN = (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, EOFError, ImportError)
BROKEN += (pickle.UnpicklingError, SafetensorError, StrictDataclassError, TemplateError)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn all that goes wrong within it into "model: NAME does not load: reason"."""
    try:
        yield
    except BROKEN as error:  # a ModelError, a ValueError, brings its own remedy
        why = error if isinstance(error, ModelError) else f"{_reason(error)}; fetch its files again"
        raise ModelError(f"model: {name} does not load: {why}") from error


def _reason(error: Exception) -> str:
    """Return an error's kind and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]]).rstrip(".: ")


def load_tokenizer(checkpoint: str) -> tuple[PreTrainedTokenizerBase, int]:
    """Load a checkpoint's tokenizer and Policy.size_factor without its weights. Raises ModelError."""
    base = base_of(checkpoint)
    with _loading(repr(base)):
        vision = _load_config(base).vision_config
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        return tokenizer, vision.patch_size * vision.spatial_merge_size


def load_policy(checkpoint: str, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> Policy:
    """Load a policy from a local folder or a hub id, or from a folder of adapters and their base.

    dtype: of its weights; "auto": as in the files. Raises ModelError if it is no Qwen-VL that can be trained
    here, if its files contradict one another, or if it does not load.
    """
    base = base_of(checkpoint)
    with _loading(repr(base) if base == checkpoint else f"{base!r} (the base in {checkpoint}/{SETTINGS})"):
        policy = _load_base(base, dtype)
    if base != checkpoint:
        with _loading(repr(checkpoint)):
            import_peft()
            if not (Path(checkpoint) / "adapter_model.safetensors").is_file():  # else a pickle would be read
                raise ModelError("it has no adapter_model.safetensors; fetch its files again")
            found = policy.model.load_adapter(checkpoint, is_trainable=True)
            _refuse_unfit({*found.missing_keys, *found.unexpected_keys})
    policy.model.to(device)
    return policy


def _load_config(checkpoint: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except BROKEN as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise ModelError(
                "there is no such folder. As a hub id it is not in the cache, and the hub cannot be reached"
                " (no network, or HF_HUB_OFFLINE is set); correct the path, or fetch it with a network"
            ) from error
        raise ModelError(
            f"it is neither a folder with a good config.json nor a hub id that can be read: {_reason(error)};"
            f" name a checkpoint folder, or a hub id such as {EXAMPLE}"
        ) from error


def _refuse_unfit(names: set[str]) -> None:
    """Raise ModelError for weights that transformers did not find or place, and would leave random."""
    if names:
        some = f"{len(names)}, such as {min(names)}"
        raise ModelError(f"its weights do not fit its configuration: {some}; fetch its files again")


def _load_base(checkpoint: str, dtype: torch.dtype | str) -> Policy:
    config = _load_config(checkpoint)
    if config.model_type not in FAMILIES:
        yet = " (not supported yet)" if config.model_type.startswith("qwen3_") else ""
        known = f"use one of {', '.join(FAMILIES)}, for example {EXAMPLE}"
        raise ModelError(f"it is a {config.model_type!r}{yet}; {known}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"quantized weights cannot be trained; use the original, for example {EXAMPLE}")
    family = FAMILIES[config.model_type]
    preprocessors = {name: content for name in PREPROCESSORS if (content := _read_json(checkpoint, name))}
    # The first file counts; what it leaves out is not looked up in the others.
    nested = preprocessors.get(PREPROCESSORS[0], {}).get("video_processor")
    video = nested or next((preprocessors[n] for n in PREPROCESSORS[1:] if n in preprocessors), {})
    # transformers passes over a broken one in silence, and an end of the answer would be forgotten.
    _read_json(checkpoint, "generation_config.json")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    check_files(config, tokenizer, video)  # before the weights, which can take minutes
    model, found = family.model_class.from_pretrained(
        checkpoint,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,  # and never a *.bin, which is a pickle
        attn_implementation={"": "sdpa", "text_config": IMPLEMENTATION, "vision_config": "sdpa"},
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        output_loading_info=True,
    )
    _refuse_unfit({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    speed_up(model)
    # Behind Policy.run; FSDP2 treats it as a forward (distributed.shard).
    model.run = types.MethodType(lambda self, function, *arguments: function(self, *arguments), model)
    vision, vocabulary = config.vision_config, tokenizer.get_vocab()
    # All tokens that end an answer (Qwen-VL has two). Nothing else of the generation config is used: its
    # repetition penalty and top-k would make the sampler another policy than the one that is scored.
    ends = model.generation_config.eos_token_id or []
    return Policy(
        model=model,
        tokenizer=tokenizer,
        family=family,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        image_mean=tuple(video.get("image_mean", family.image_mean)),
        image_std=tuple(video.get("image_std", family.image_std)),
        preprocessors=preprocessors,
        eos_ids=sorted({vocabulary["<|im_end|>"], *(ends if isinstance(ends, list) else [ends])}),
        end_id=vocabulary["<|im_end|>"],
        forbidden_ids=[vocabulary[token] for token in FORBIDDEN_TOKENS if token in vocabulary],
        video_id=vocabulary["<|video_pad|>"],
        compute=model.dtype,
    )


def _read_json(checkpoint: str, name: str) -> dict:
    """Read a file of a checkpoint folder or hub repository; {} if it has none."""
    path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def check_files(config: PreTrainedConfig, tokenizer, video: dict) -> None:
    """Raise ModelError if files would make training wrong in silence. video: the preprocessor's settings."""
    vision, vocabulary = config.vision_config, tokenizer.get_vocab()
    if missing := [token for token in (*TOKEN_IDS.values(), "<|im_end|>") if token not in vocabulary]:
        raise ModelError(f"its tokenizer lacks {', '.join(missing)}; use the one shipped with Qwen-VL")
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    sizes |= {"merge_size": vision.spatial_merge_size}
    same = [(key, size, video.get(key, size), "its preprocessor") for key, size in sizes.items()]
    same += [(key, getattr(config, key), vocabulary[t], "its tokenizer") for key, t in TOKEN_IDS.items()]
    for key, ours, theirs, where in same:
        if ours != theirs:
            found = f"{key} is {ours!r} in its config.json, but {theirs!r} in {where}"
            raise ModelError(f"{found}; fetch its files again")
    try:
        chat = render_chat(tokenizer, QUESTION)
    except ModelError as error:  # of a model that knows no videos, for example
        chat = f"an error: {error}"
    before, block, after = chat.partition(VIDEO_BLOCK)
    one_block = block and "<|video_pad|>" not in before + after
    # The templates of "Thinking" checkpoints open a <think> at the end, with which no answer of ours begins.
    if not (one_block and QUESTION in after and after.endswith("<|im_start|>assistant\n")):
        chat = chat if len(chat) <= 80 else f"{chat[:38]}...{chat[-39:]}"
        raise ModelError(
            f"its chat template gives {chat!r}, not {VIDEO_BLOCK}, the text and '<|im_start|>assistant\\n';"
            " use the template of an Instruct checkpoint"
        )


def load_trainable(config: Config) -> Policy:
    """Load a configuration's checkpoint onto this rank's device, with what is trained in fp32 and the rest
    (all but the adapters, or the vision tower) frozen."""
    if config.lora.rank:
        import_peft()
    policy = load_policy(config.model, dtype="auto")
    if policy.has_adapters:
        raise ConfigError(f"model: {config.model} holds adapters, which cannot be trained; name their base")
    if config.lora.rank:
        add_adapters(policy.model, config.lora, config.seed)
    elif config.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    compute, (_, world_size) = compute_dtype(config), distributed.init()
    policy = dataclasses.replace(policy, compute=compute)
    if world_size > 1 or (compute != torch.float32 and not config.lora.rank):
        distributed.shard(policy.model, policy.blocks, compute)
        return policy
    distributed.to_device(policy.model, compute)
    return dataclasses.replace(policy, autocast=compute != torch.float32)  # for the adapters, in fp32


def freeze(policy: Policy, config: Config) -> Policy:
    """Copy a policy as the reference of the KL, which never changes."""
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


def compute_dtype(config: Config) -> torch.dtype:
    return getattr(torch, DTYPES[config.precision])
