"""attention.py against softmax written out, one token at a time; and sampling with it: in blocks of any size,
with rows that leave or stay, as one compiled piece, without a word from the GPU between two checks."""

import types
from dataclasses import replace

import pytest
import torch
from test_model import KEYS, ids_of, make_prompts, with_many_ends
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
    expected = torch.cat(
        [((keys[:, h // 2] @ query[-1, h]).softmax(0) @ values[:, h // 2])[None] for h in range(A)]
    )
    torch.testing.assert_close(out[0, 0].double(), expected, rtol=2**-8, atol=1e-3)


def test_without_a_prefix_it_is_the_usual_attention(rows):
    module = types.SimpleNamespace(num_key_value_groups=A // K, is_causal=True, training=False)
    q, k, v = (x[:, :, : PROMPTS[0]] for x in rows[0])
    out, _ = attend(module, q, k, v, None, scaling=SCALE)
    torch.testing.assert_close(out[0], written_out(rows)[0][: PROMPTS[0]], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Sampling


class Heard(TorchDispatchMode):
    """The names of all operations."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_blocks_and_static_shapes_change_no_answer(policy):
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    expected = ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS, block=1))
    assert len({len(ids) for group in expected for ids in group}) > 4
    for block, static in ((2, False), (5, False), (16, False), (1, True), (3, True), (99, True)):
        assert ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS, block=block, static=static)) == expected


def test_rows_leave_or_stay(qwen2_5):
    """How many rows the model computes for each token: at most as many as answers that had not ended before
    the block, filled up to the same number for each prompt."""
    policy, prompts = with_many_ends(qwen2_5), make_prompts(qwen2_5)
    rows = []
    policy.model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    answers = ids_of(rollout(policy, prompts, 5, 16, 1.0, KEYS, block=1))
    expected = [3]  # the first token: of each prompt
    for t in range(1, 16):
        going = [sum(len(ids) > t for ids in group) for group in answers]
        # Whoever ends at the first token is noticed after the second.
        full = t == 1
        expected.append(15 if full else sum(n > 0 for n in going) * max(going))
    while expected[-1] == 0:
        expected.pop()
    assert rows == expected and rows[-1] < 15
    rows.clear()
    rollout(policy, prompts, 5, 16, 1.0, KEYS, block=4, static=True)
    assert set(rows[1:]) == {15}


def test_nobody_samples_on_when_all_have_ended(qwen2_5):
    """All answers end with their first token; it is seen after the second."""
    policy, prompts = replace(qwen2_5, eos_ids=list(range(len(qwen2_5.tokenizer)))), make_prompts(qwen2_5)
    for static in (False, True):
        rows = []
        hook = policy.model.lm_head.register_forward_hook(lambda *_, rows=rows: rows.append(len(_[2])))
        answers = rollout(policy, prompts, 2, 16, 1.0, KEYS, block=1, static=static)
        hook.remove()
        assert rows == [3, 6] and all(len(ids) == 1 for group in ids_of(answers) for ids in group)


def test_nothing_is_asked_of_the_device_between_checks(qwen2_5):
    """A number or a size that the host needs (_local_scalar_dense, nonzero) would make it wait for the GPU at
    each token."""
    waits = {}
    for block, tokens in ((8, 10), (8, 16), (8, 18), (100, 40)):
        policy = replace(qwen2_5, eos_ids=[])
        prompts = make_prompts(policy)
        encoded = prefill(policy, prompts)
        with Heard() as heard:
            rollout(policy, prompts, 2, tokens, 1.0, KEYS, encoded, block=block, static=True)
        waits[block, tokens] = sum(
            name.startswith(("_local_scalar_dense", "nonzero", "is_nonzero")) for name in heard.names
        )
    assert waits[8, 10] == waits[8, 16] == waits[8, 18] - 1 == waits[100, 40] + 1  # one for each check


def test_a_token_is_one_compiled_piece(qwen2_5, monkeypatch):
    """torch.compile takes the work of a token whole (fullgraph), and once for all tokens: its shapes do not
    change. (With a backend that runs the graph as it is; a GPU's would record it.)"""
    policy, prompts, compiled = with_many_ends(qwen2_5), make_prompts(qwen2_5), []
    expected = ids_of(rollout(policy, prompts, 3, 20, 1.0, KEYS))

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model._next_logits, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(model, "_next_logits", step)
    assert ids_of(rollout(policy, prompts, 3, 20, 1.0, KEYS, static=True)) == expected
    assert len(compiled) == 1
