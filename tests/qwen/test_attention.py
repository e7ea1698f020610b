"""qwen/attention.py against softmax written out, one token at a time; and the decode loop around it: finished
rows leave, a token is one compiled piece, and nothing waits for the GPU between two compactions."""

import types
from dataclasses import replace

import pytest
import torch
from one_by_one import KEYS, ids_of, make_prompts, with_many_ends
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import prefill, rollout
from qwen.attention import AnswerAttention, DecodeAttention, PromptAttention, attend

PROMPTS, ANSWERS = (5, 3), ([4, 1, 2], [3, 3, 6])  # tokens of two prompts, and of three answers to each
A, K, D, SCALE = 4, 2, 8, 0.3


def random_rows(tokens, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, D, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def rows():
    """(query, key, value) of the prompts' row and of the answers' row, as a layer hands them over."""
    return [
        [random_rows(tokens, heads, 3 * part + n) for n, heads in enumerate((A, K, K))]
        for part, tokens in enumerate((sum(PROMPTS), sum(map(sum, ANSWERS))))
    ]


def softmax_attention(query, keys, values):
    """One token: query (A, d); keys, values (n, K, d), all of which it sees. Returns (A, d)."""
    out = []
    for head in range(A):
        k, v = keys[:, head // (A // K)], values[:, head // (A // K)]
        out.append((k @ query[head] * SCALE).softmax(0) @ v)
    return torch.stack(out)


def written_out(rows):
    """What each token of the two rows gets: (prompt tokens, A, d) and (answer tokens, A, d)."""
    (q, k, v), (own_q, own_k, own_v) = [[x[0].transpose(0, 1) for x in row] for row in rows]
    prompts, answers, begin, m = [], [], 0, 0
    for P, lengths in zip(PROMPTS, ANSWERS, strict=True):
        end = begin + P
        prompts += [softmax_attention(q[i], k[begin : i + 1], v[begin : i + 1]) for i in range(begin, end)]
        for n in lengths:
            for i in range(m, m + n):
                keys = torch.cat([k[begin:end], own_k[m : i + 1]])
                values = torch.cat([v[begin:end], own_v[m : i + 1]])
                answers.append(softmax_attention(own_q[i], keys, values))
            m += n
        begin = end
    return torch.stack(prompts), torch.stack(answers)


@pytest.mark.parametrize("fewer_heads", [("cpu",), ()], ids=["as on a CPU", "as on a GPU"])
def test_prompts_and_answers_attend_as_written_out(rows, monkeypatch, fewer_heads):
    """Values, and gradients of all queries, keys and values: those of a prompt come from its answers, too."""
    monkeypatch.setattr("qwen.attention.FEWER_HEADS", fewer_heads)
    expected = written_out(rows)
    prompts = PromptAttention(list(PROMPTS))
    found = [prompts.attend(0, *rows[0], SCALE)]
    answers = AnswerAttention(prompts.prefixes(), [list(lengths) for lengths in ANSWERS])
    found.append(answers.attend(0, *rows[1], SCALE))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in expected]
    inputs = [*rows[0], *rows[1]]
    gradients = []
    for outputs in (expected, [x[0] for x in found]):
        loss = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for x, y in zip((*expected, *gradients[0]), (*(f[0] for f in found), *gradients[1]), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 7], ids=lambda block: f"{block} at a time")
def test_decoding_attends_token_by_token(rows, block):
    """Answers of six tokens each, of which so many more at a time are computed with; from the third token on
    the middle answer of each prompt is left out, from the fifth the second prompt."""
    prompts = PromptAttention(list(PROMPTS))
    prompts.attend(0, *rows[0], SCALE)
    lengths = [[6] * 3] * 2
    own = [random_rows(36, heads, 20 + n) for n, heads in enumerate((A, K, K))]
    whole = AnswerAttention(prompts.prefixes(), lengths).attend(0, *own, SCALE)[0].view(2, 3, 6, A, D)
    decode, left = DecodeAttention(prompts.prefixes(), 3, 7), torch.arange(6).view(2, 3)
    for t in range(6):
        if t == 2:
            left = left[:, [0, 2]]
            decode.keep(torch.tensor([0, 1]), torch.tensor([[0, 2], [0, 2]]))
        if t == 4:
            left = left[:1]
            decode.keep(torch.tensor([0]), torch.tensor([[0, 1]]))
        if t % block == 0:
            decode.widen(t + block)
        token = [x[0].transpose(0, 1).view(6, 6, -1, D)[left.flatten(), t, :, None] for x in own]
        out = decode.attend(0, *token, SCALE)
        decode.advance()
        # It computes in fp32.
        expected = whole.flatten(0, 1)[left.flatten(), t]
        torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_decoding_computes_in_fp32(autocast):
    """Large scores of bf16 keys, which bf16 would round by more than 1: the result is that of exact sums."""
    rows = [(4 * random_rows(n, heads, n + heads)).bfloat16() for n in (64, 1) for heads in (A, K, K)]
    prompts = PromptAttention([64])
    prompts.attend(0, *rows[:3], 1.0)
    decode = DecodeAttention(prompts.prefixes(), 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = decode.attend(0, *rows[3:], 1.0)
    query, keys, values = (
        torch.cat([prompt, own], 2)[0].transpose(0, 1).double()
        for prompt, own in zip(rows[:3], rows[3:], strict=True)
    )
    expected = [(keys[:, h // 2] @ query[-1, h]).softmax(0) @ values[:, h // 2] for h in range(A)]
    torch.testing.assert_close(out[0, 0].double(), torch.stack(expected), rtol=2**-8, atol=1e-3)


def test_without_a_prefix_it_is_the_usual_attention(rows):
    module = types.SimpleNamespace(num_key_value_groups=A // K, is_causal=True, training=False)
    q, k, v = (x[:, :, : PROMPTS[0]] for x in rows[0])
    out, _ = attend(module, q, k, v, None, scaling=SCALE)
    torch.testing.assert_close(out[0], written_out(rows)[0][: PROMPTS[0]], rtol=0, atol=1e-12)


def test_compaction_changes_no_answer(policy, monkeypatch):
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    expected = ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS))
    assert len({len(ids) for group in expected for ids in group}) > 4
    for tokens in (1, 5, 99):
        monkeypatch.setattr(model, "COMPACT_EVERY", tokens)
        assert ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS)) == expected


def test_finished_rows_leave(qwen2_5, monkeypatch):
    """How many rows the model computes for each token: as many as answers that had not ended, filled up to
    the same number for each prompt."""
    monkeypatch.setattr(model, "COMPACT_EVERY", 1)
    policy, prompts, rows = with_many_ends(qwen2_5), make_prompts(qwen2_5), []
    policy.model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    answers = ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS))
    expected = [3, 15]  # the first token, of each prompt; who ends there is noticed after the second
    for t in range(2, 16):
        going = [sum(len(ids) > t for ids in group) for group in answers]
        expected.append(sum(n > 0 for n in going) * max(going))
    assert rows == [n for n in expected if n] and rows[-1] < 15
    rows.clear()
    policy = replace(policy, eos_ids=list(range(len(policy.tokenizer))))  # all end with their first token
    assert all(len(ids) == 1 for group in ids_of(rollout(policy, prompts, 2, 16, 1.0, KEYS)) for ids in group)
    assert rows == [3, 6]


class Heard(TorchDispatchMode):
    """The names of all operations."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_is_asked_of_the_device_between_compactions(qwen2_5):
    """A number or a size that the host needs (_local_scalar_dense, nonzero) would make it wait for the GPU at
    each token."""
    policy, waits = replace(qwen2_5, eos_ids=[]), []
    caches = prefill(policy, make_prompts(policy))
    for tokens in (10, 16, 18):  # a compaction after 9 tokens, and after 17
        with Heard() as heard:
            rollout(policy, make_prompts(policy), 2, tokens, 1.0, KEYS, caches)
        asked = ("_local_scalar_dense", "nonzero", "is_nonzero")
        waits.append(sum(name.startswith(asked) for name in heard.names))
    assert waits[0] == waits[1] < waits[2]


def test_a_token_is_one_compiled_piece(qwen2_5, monkeypatch):
    """torch.compile takes the work of a token whole (fullgraph), and once for all tokens between compactions:
    no shape changes. (With a backend that runs the graph as it is; a GPU's would record it.)"""
    policy, prompts, compiled = with_many_ends(qwen2_5), make_prompts(qwen2_5), []
    expected = ids_of(rollout(policy, prompts, 3, 20, 1.0, KEYS))

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model._next_logits, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(model, "_next_logits", step)
    monkeypatch.setattr(model, "COMPACT_EVERY", 99)
    assert ids_of(rollout(policy, prompts, 3, 20, 1.0, KEYS)) == expected
    assert len(compiled) == 1
