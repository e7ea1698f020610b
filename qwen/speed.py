"""Replace three slow forwards of transformers' Qwen-VL; the numbers stay the same up to rounding."""

import types

import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def _rms_norm(self, hidden_states):
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _window_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """hidden_states: (n, H), one window after the other; cu_seqlens: where each begins, and n."""
    n = len(hidden_states)
    q, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)  # (n, heads, d)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths = cu_seqlens.diff()
    window_length = lengths.repeat_interleave(lengths)  # (n,) of each patch's window
    distinct, out = lengths.unique().tolist(), torch.empty_like(q)
    for length in distinct:
        rows = window_length == length if len(distinct) > 1 else slice(None)  # a slice copies nothing
        windows = [x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]  # (w, heads, l, d)
        out[rows] = F.scaled_dot_product_attention(*windows).transpose(1, 2).flatten(0, 1)
    return self.proj(out.flatten(1))


def _embed_patches(self, hidden_states):
    return F.linear(hidden_states.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


FORWARDS = {"RMSNorm": _rms_norm, "VisionAttention": _window_attention, "PatchEmbed": _embed_patches}


def speed_up(model: torch.nn.Module) -> None:
    """Replace them in place. A norm is one call, not seven. Attention of the vision tower calls its kernel
    once for each distinct size of window, not in a Python loop over all windows. Its patch embedding, a
    convolution whose stride is its kernel, is one matrix product."""
    for module in model.modules():
        for suffix, forward in FORWARDS.items():  # every family's classes are called so
            if type(module).__name__.endswith(suffix):
                module.forward = types.MethodType(forward, module)
