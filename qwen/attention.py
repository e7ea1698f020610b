"""Attention in which a prompt is computed, and kept, once for all its answers.

A token of an answer attends to the prompt and to its own answer, never to other answers. Each of three passes
through the model has an object that does its attention:

    PromptAttention    B prompts, one after the other in one row; keeps the keys and values of each
    AnswerAttention    whole answers, one after the other in one row, to be scored
    DecodeAttention    the next token of each answer, to be sampled

`model.model(..., shared_prefix=OBJECT)` hands it down to every layer of the language model, whose attention
function is registered as IMPLEMENTATION. Without one the model behaves as it always does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "shared_prefix"  # for from_pretrained(attn_implementation=...)
# transformers takes a mask of four dimensions as it is. None is needed, but it would make one.
NO_MASK = torch.empty(1, 1, 1, 1)
FEWER_HEADS = ("cpu",)  # elsewhere no fast kernel takes a mask and fewer heads of keys than of queries
KV = tuple[Tensor, Tensor]  # of one layer, each (1, K, tokens, d): K heads of width d


def attend(module, query, key, value, attention_mask, shared_prefix=None, scaling=None, **kwargs):
    """The attention function of a layer. query: (rows, A, tokens, d); key, value: (rows, K, tokens, d)."""
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class PromptAttention:
    """Each prompt attends to itself. lengths: tokens of each of the B prompts in the row."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self._layers: dict[int, KV] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._layers.setdefault(layer, (key, value))  # not again when checkpointing recomputes the layer
        causal, split = {"is_causal": True, "scale": scale, "enable_gqa": True}, self.lengths
        prompts = zip(query.split(split, 2), key.split(split, 2), value.split(split, 2), strict=True)
        out = [F.scaled_dot_product_attention(*qkv, **causal) for qkv in prompts]
        return torch.cat(out, 2).transpose(1, 2)  # (1, N, A, d)

    def prefixes(self) -> list[list[KV]]:
        """Return each prompt's keys and values in all layers."""
        layers = [self._layers[n] for n in range(len(self._layers))]
        cut = [zip(k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True) for k, v in layers]
        return [list(layers) for layers in zip(*cut, strict=True)]


class AnswerAttention:
    """Each answer attends to its prompt and to itself. prefixes: of each of the B prompts, from
    PromptAttention. lengths: of the answers to each, which stand one after the other in the row. For the
    attention alone they are padded to the prompt's longest, and its keys and values are copied for each."""

    def __init__(self, prefixes: list[list[KV]], lengths: list[list[int]]):
        self.prefixes, self.lengths, self.masks = prefixes, lengths, []
        for ((key, _), *_), group in zip(prefixes, lengths, strict=True):
            C, P = max(group), key.shape[2]
            # (C, P + C), added to the scores: token i sees the prompt and the first i + 1 of its answer.
            self.masks.append(key.new_full((C, P + C), -torch.inf).triu(P + 1))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        sizes = [sum(group) for group in self.lengths]
        groups = zip(*(x[0].transpose(0, 1).split(sizes) for x in (query, key, value)), strict=True)
        out = []
        for prefix, lengths, mask, group in zip(self.prefixes, self.lengths, self.masks, groups, strict=True):
            padded = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in group)
            q, *own = padded  # (G, A or K, C, d)
            shared = (x.expand(len(lengths), -1, -1, -1) for x in prefix[layer])
            k, v = (torch.cat(parts, 2) for parts in zip(shared, own, strict=True))  # (G, K, P + C, d)
            if q.device.type not in FEWER_HEADS:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            fewer = k.shape[1] < q.shape[1]
            attended = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=fewer)
            out += [answer[:n] for answer, n in zip(attended.transpose(1, 2), lengths, strict=True)]
        return torch.cat(out)[None]  # (1, M, A, d)


class DecodeAttention:
    """The next token of each of G answers to each of B prompts attends to its prompt and its own answer. The
    B * G rows stand prompt by prompt; a prompt's keys meet the queries of all its answers in one product.

    There is room for max_tokens of each answer, of which the first `width` are computed with. Between two
    calls of `widen` or `keep` no tensor changes its shape, so a GPU can record a token's work and replay it.
    """

    def __init__(self, prefixes: list[list[KV]], num_generations: int, max_tokens: int):
        lengths = torch.tensor([prefix[0][0].shape[2] for prefix in prefixes])
        self.prompts = []  # of each layer, keys and values: (B, K, P, d), padded on the right
        for layer in zip(*prefixes, strict=True):
            both = zip(*layer, strict=True)
            padded = (pad_sequence([x[0].transpose(0, 1) for x in xs], batch_first=True) for xs in both)
            self.prompts.append([x.transpose(1, 2).contiguous() for x in padded])
        B, K, P, d = self.prompts[0][0].shape
        shape, device = (B, num_generations, K, max_tokens, d), self.prompts[0][0].device
        self.answers = [[x.new_zeros(shape) for x in layer] for layer in self.prompts]
        # Added to the scores: 0 where there is a key, -inf where there is none.
        self.padding = _bias(torch.arange(P) < lengths[:, None])[:, None, None, None].to(device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # tokens that each answer has
        self.widen(max_tokens)

    def widen(self, width: int) -> None:
        """Compute with the first `width` tokens of each answer from now on."""
        self.width = width
        self._places = torch.arange(width, device=self.step.device)
        self.future = _bias(self._places <= self.step)  # (width,)

    def advance(self) -> None:
        """End the token at hand."""
        self.step += 1
        self.future = _bias(self._places <= self.step)

    def keep(self, prompts: Tensor, answers: Tensor) -> None:
        """Keep these prompts, (B',) indices, and these answers to them, (B', G')."""
        self.padding = self.padding[prompts]
        self.prompts = [[x[prompts] for x in layer] for layer in self.prompts]
        self.answers = [[x[prompts[:, None], answers] for x in layer] for layer in self.answers]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query: (B * G, A, 1, d). In fp32, as the fused kernels that score: a product of bf16 is rounded to
        bf16, which would sample from another policy."""
        B, G, K, _, d = self.answers[layer][0].shape
        for kept, new in zip(self.answers[layer], (key, value), strict=True):
            kept.index_copy_(3, self.step, new.view(B, G, K, 1, d))
        with torch.autocast(query.device.type, enabled=False):
            keys, values = (x.float() for x in self.prompts[layer])
            own_keys, own_values = (x[:, :, :, : self.width].float() for x in self.answers[layer])
            q = query.float().view(B, G, K, -1, d) * scale  # (B, G, K, r, d): r = A / K queries share a key
            to_prompt = q.transpose(1, 2).flatten(2, 3) @ keys.transpose(2, 3)  # (B, K, G * r, P)
            to_own = (q @ own_keys.transpose(3, 4)).transpose(1, 2)  # (B, K, G, r, width)
            scores = torch.cat([to_prompt.unflatten(2, (G, -1)) + self.padding, to_own + self.future], -1)
            to_prompt, to_own = scores.softmax(-1).split([keys.shape[2], self.width], -1)
            out = (to_prompt.flatten(2, 3) @ values).unflatten(2, (G, -1)).transpose(1, 2)  # (B, G, K, r, d)
            out = out + to_own.transpose(1, 2) @ own_values
        return out.reshape(B * G, 1, -1, d).to(query.dtype)


def _bias(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, -torch.inf)
