"""LoRA: train small adapters beside the linear layers of a frozen model, through transformers and peft.

A layer's output W x becomes W x + (alpha / rank) B A x, with B = 0 at first (arXiv 2106.09685).
A checkpoint is peft's: adapter_config.json, which names the base, and adapter_model.safetensors.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from config import Lora
from runtime.files import ModelError

NAME = "default"  # transformers' name of a model's first adapters
SETTINGS = "adapter_config.json"


def import_peft():
    """Return the package peft, which only LoRA needs. Raises ModelError if it is missing."""
    try:
        import peft
    except ImportError:
        raise ModelError("LoRA needs the package peft: pip install peft==0.21.2") from None
    return peft


def adapted_layers(model: nn.Module, targets: list[str]) -> list[nn.Linear]:
    """Return the language model's linear layers of these names. Raises ModelError if a name has none."""
    layers = {}
    for path, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            layers.setdefault(path.rpartition(".")[2], []).append(module)
    if unknown := sorted(set(targets) - layers.keys()):
        raise ModelError(f"lora.targets: no layer is called {unknown[0]!r}; use {', '.join(layers)}")
    return [layer for target in targets for layer in layers[target]]


def add_adapters(model: nn.Module, lora: Lora, seed: int = 0) -> None:
    """Freeze a model and add adapters in place: trainable, fp32, without effect yet, alike on all ranks."""
    adapted_layers(model, lora.targets)  # peft ignores a name that none has
    visual = r"(.*\.)?visual(\..*)?"  # Qwen2.5-VL's tower has layers of the same names
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(import_peft().LoraConfig(**settings, exclude_modules=visual))
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives each adapter the dtype of its layer
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def without_adapters(policy) -> Iterator[None]:
    """Switch a policy's adapters off: it is then the reference of the KL, without a second copy."""
    # peft's own switch also sets requires_grad, which FSDP2 keeps in two places.
    layers = [module for module in policy.model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale(NAME, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(NAME, 1)  # times alpha / rank


def base_of(checkpoint: str) -> str:
    """Return the base of a folder of adapters; any other checkpoint is its own base. Raises ModelError."""
    path = Path(checkpoint) / SETTINGS
    if not path.is_file():
        return checkpoint
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if base and not (Path(base) / SETTINGS).is_file():
            return str(base)
    what = f"write base_model_name_or_path into its {SETTINGS}: a model without adapters"
    raise ModelError(f"model: {checkpoint!r}: {what}")


def save_adapters(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what PeftModel.from_pretrained(base, folder) reads. state: name -> whole tensor of an adapter."""
    # Not by the model's save_pretrained: it asks the hub for the base, half a minute without a network.
    settings, base = copy.copy(model.peft_config[NAME]), Path(model.name_or_path)
    settings.base_model_name_or_path = str(base.resolve() if base.exists() else base)
    settings.inference_mode = True  # as peft saves it
    settings.target_modules = sorted(settings.target_modules)  # a set has another order each time
    settings.save_pretrained(folder)
    state = import_peft().get_peft_model_state_dict(model, state, NAME, save_embedding_layers=False)
    state = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
