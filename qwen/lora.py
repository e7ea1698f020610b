"""LoRA: small adapters beside the linear layers of a frozen model are trained in its stead.

A layer's output W x becomes W x + (alpha / rank) B A x, with B = 0 at first (https://arxiv.org/abs/2106.09685).
The layers are those of the `peft` package, which only runs with LoRA need. So is the form of a checkpoint:
adapter_config.json, which names the base, and adapter_model.safetensors. `policy` is always a policy.Policy.
"""

import contextlib
import copy
import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import Lora
from runtime.files import ModelError

PEFT = "peft==0.21.2"
NAME = "default"  # of the adapters in peft, where a model may have several sets of them
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _peft() -> types.ModuleType:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ModelError(f"LoRA needs the package peft: pip install {PEFT}") from None


def check_peft(lora: Lora) -> None:
    """Raises ModelError where adapters are asked for, and peft is not there."""
    if lora.rank:
        _peft()


def has_adapters(policy) -> bool:
    return hasattr(policy.model, "peft_config")


def adapted_layers(model: nn.Module, targets: list[str]) -> list[nn.Linear]:
    """The linear layers of the language model that have one of these names. Raises ModelError for a name that
    none has."""
    layers = {}
    for path, layer in model.model.language_model.named_modules():
        if isinstance(layer, nn.Linear):
            layers.setdefault(path.rpartition(".")[2], []).append(layer)
    for target in targets:
        if target not in layers:
            raise ModelError(
                f"lora: targets: {target!r} is no linear layer of this language model; name some of"
                f" {', '.join(sorted(layers))}"
            )
    return [layer for target in targets for layer in layers[target]]


def add_adapters(policy, lora: Lora, seed: int = 0) -> None:
    """Freeze a policy and give it adapters, in place: trainable, in float32, without effect as yet, and the
    same on every rank. Raises ModelError for a target that is no linear layer of its language model."""
    peft, model = _peft(), policy.model
    if has_adapters(policy):
        raise ModelError("lora: the model has adapters already; set `model` to their base")
    adapted_layers(model, lora.targets)
    base = Path(model.name_or_path)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        exclude_modules=r"(.*\.)?visual(\..*)?",  # Qwen2.5-VL's has layers of the same names
        base_model_name_or_path=str(base.resolve()) if base.exists() else model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives each adapter the dtype of its layer
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def without_adapters(policy) -> Iterator[None]:
    """Within it a policy is what it was before it got adapters: the reference of the KL, without a second
    copy. Nothing happens to a policy that has none."""
    layers = []
    if has_adapters(policy):
        kind = _peft().tuners.lora.LoraLayer
        layers = [module for module in policy.model.modules() if isinstance(module, kind)]
    # peft's own switch would also set requires_grad, which FSDP2 keeps in two places.
    for layer in layers:
        layer.set_scale(NAME, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(NAME, 1)  # times alpha / rank


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


def base_of(checkpoint: str) -> str:
    """The checkpoint whose adapters a folder holds; any other checkpoint is its own. Raises ModelError."""
    path = Path(checkpoint) / SETTINGS
    if not path.is_file():
        return checkpoint
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        base = None
    if not (isinstance(base, str) and base):
        raise ModelError(
            f"model: {checkpoint!r}: its {SETTINGS} names no base_model_name_or_path; write there the"
            " checkpoint that the adapters were trained on"
        )
    return base


def load_adapters(policy, folder: str) -> None:
    """Give a policy, which is the base, the adapters of a folder, in place, in the dtype of their layers.
    Raises ModelError where they do not fit, and whatever peft raises for broken files."""
    peft, model = _peft(), policy.model
    settings = peft.PeftConfig.from_pretrained(folder)
    if settings.peft_type != peft.PeftType.LORA:
        raise ModelError(f"model: {folder!r} holds {settings.peft_type} adapters; only LoRA is known here")
    settings.inference_mode = False  # else peft would freeze them, too
    peft.inject_adapter_in_model(settings, model, NAME)
    state = load_file(Path(folder) / WEIGHTS)
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = peft.set_peft_model_state_dict(model, state, NAME)
    missing = sorted(ours & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if missing:
        raise ModelError(
            f"model: {folder!r}: its {WEIGHTS} does not fit its {SETTINGS} and its base: {missing[0]} and"
            f" {len(missing) - 1} more; fetch its files again"
        )


def write_adapters(policy, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what PeftModel.from_pretrained(base, folder) reads. state: name -> the whole tensor of each
    adapter. Raises OSError or SafetensorError."""
    peft, model = _peft(), policy.model
    settings = copy.copy(model.peft_config[NAME])
    settings.inference_mode = True  # as peft writes it: whoever loads them gets them frozen
    settings.target_modules = sorted(settings.target_modules)  # a set: in another order each time
    settings.save_pretrained(folder)
    state = peft.get_peft_model_state_dict(model, state, NAME, save_embedding_layers=False)
    state = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
