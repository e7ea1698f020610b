"""Advantages, KL and loss on plain tensors: against hand numbers, loops, and what must not change them."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import pad

from grpo import AGGREGATIONS, group_advantages, kl_k3, loss_normalizer, masked_mean, policy_loss

MAX_TOKENS = 10
SETTINGS = {"clip_eps": 0.2, "kl_beta": 0.05}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def batch(rows=8, length=7, seed=0, spread=0.5):
    """logprobs (with gradient), old, ref (B, C), advantages (B,) and a mask with rows of 1 to C tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, ref = -torch.rand(3, rows, length, generator=generator, dtype=torch.float64) * 3 * spread
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = length, 1
    mask = torch.arange(length) < lengths[:, None]
    return logprobs.requires_grad_(), old, ref, advantages, mask


def loss_and_gradient(logprobs, old, ref, advantages, mask, aggregation="token-mean", **settings):
    settings = SETTINGS | settings
    settings.setdefault("normalizer", loss_normalizer(mask, aggregation, MAX_TOKENS))
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, old, ref, advantages, mask, aggregation=aggregation, **settings)
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


def test_advantages_by_hand():
    # mean 3; deviations -2, -1, 0, 3; sample variance (4 + 1 + 0 + 9) / 3
    std = math.sqrt(14 / 3)
    expected = [deviation / (std + 1e-6) for deviation in (-2, -1, 0, 3)]
    assert group_advantages(tensor([1, 2, 3, 6])).tolist() == pytest.approx(expected, abs=1e-15)
    assert group_advantages(tensor([1, 2, 3, 6]), scale_rewards=False).tolist() == [-2, -1, 0, 3]


def test_the_epsilon_matters_where_rewards_hardly_differ():
    # 3.0 and 3.0 + 2e-6: sample std sqrt(2) * 1e-6, advantages +-1e-6 / (sqrt(2) * 1e-6 + 1e-6)
    expected = 1 / (math.sqrt(2) + 1)
    advantages = group_advantages(tensor([3.0, 3.0 + 2e-6])).tolist()
    assert advantages == pytest.approx([-expected, expected], rel=1e-6)


@pytest.mark.parametrize("scale_rewards", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("reward", [0.1, -1.1333333333333333, 5.0])
def test_equal_rewards_are_exact_zeros(size, reward, scale_rewards):
    assert group_advantages(tensor([reward] * size), scale_rewards).tolist() == [0.0] * size


def test_advantages_are_float64_whatever_comes_in():
    rewards = torch.tensor([0.1, 0.7, 0.2])
    assert group_advantages(rewards).dtype == torch.float64
    assert group_advantages(rewards).tolist() == group_advantages(rewards.double()).tolist()


def test_advantages_ignore_shift_and_scale():
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = group_advantages(rewards)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-14)
    assert advantages.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(group_advantages(rewards + 100), advantages, atol=1e-12, rtol=0)
    torch.testing.assert_close(group_advantages(rewards * 100), advantages, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rewards", [[], [1.0, float("nan")], [float("inf"), 0.0], [[1.0, 2.0]]])
def test_wrong_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="one finite number for each answer"):
        group_advantages(tensor(rewards))


def test_k3_by_hand():
    # reference / policy = 2 and 1/2: 2 - 1 - ln 2 and 1/2 - 1 + ln 2
    kl = kl_k3(tensor([-1.0, -1.0, -1.0]), tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0]))
    assert kl.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], abs=1e-15)
    assert kl[2] == 0  # exactly, where policy and reference agree


def test_k3_estimates_the_kl():
    """Its expectation under the policy is KL(policy || reference), summed over a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    expectation = (policy.exp() * kl_k3(policy, reference)).sum()
    kl = torch.distributions.kl_divergence(*(Categorical(logits=x) for x in (policy, reference)))
    torch.testing.assert_close(expectation, kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_k3_is_finite_and_not_negative(dtype):
    small = [10.0**-k for k in range(12)]
    ratios = torch.tensor([0.0, 1e4, -1e4, 88.8, -88.8, 709.8, 20.0, -20.0, *small, *[-x for x in small]])
    logprobs = torch.zeros_like(ratios, dtype=dtype).requires_grad_()
    kl = kl_k3(logprobs, ratios.to(dtype))
    kl.sum().backward()
    assert kl.isfinite().all() and (kl >= 0).all() and logprobs.grad.isfinite().all()
    assert kl[1].item() == pytest.approx(math.exp(20) - 21, rel=1e-2)  # the clamp is at 20
    assert logprobs.grad[1] == logprobs.grad[2] == 0  # and beyond it there is nothing to pull


def test_gradient_of_k3():
    """d/dp (exp(q - p) - 1 - (q - p)) = 1 - exp(q - p)"""
    logprobs, _, ref, _, _ = batch()
    kl_k3(logprobs, ref).sum().backward()
    torch.testing.assert_close(logprobs.grad, 1 - (ref - logprobs.detach()).exp())


def loop_loss(logprobs, old, ref, advantages, mask, aggregation, clip_eps, kl_beta):
    """Eq. 12 a token at a time, in Python floats."""
    rows, lengths = [], []
    for b in range(len(advantages)):
        terms, a = [], advantages[b].item()
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                continue
            p, o = logprobs[b, t].item(), old[b, t].item()
            ratio = math.exp(p - o)
            clipped = min(max(ratio, 1 - clip_eps), 1 + clip_eps)
            difference = ref[b, t].item() - p
            kl = math.exp(difference) - 1 - difference
            terms.append(-min(ratio * a, clipped * a) + kl_beta * kl)
        rows.append(sum(terms))
        lengths.append(len(terms))
    if aggregation == "token-mean":
        return sum(rows) / sum(lengths)
    if aggregation == "sequence-mean":
        return sum(row / length for row, length in zip(rows, lengths, strict=True)) / len(rows)
    return sum(rows) / (len(rows) * MAX_TOKENS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_loss_against_the_formula(aggregation, seed):
    tensors = batch(seed=seed)
    loss, gradient, metrics = loss_and_gradient(*tensors, aggregation)
    assert loss.item() == pytest.approx(loop_loss(*tensors, aggregation, **SETTINGS), rel=1e-12)
    assert 0.05 < metrics["clip_frac"] < 0.95 or aggregation == "constant"  # both branches were at work
    logprobs, eps = tensors[0].detach(), 1e-6
    for b, t in ((0, 0), (0, 6), (1, 0), (3, 0)):  # the gradient, by differences of the loop's loss
        bump = torch.zeros_like(logprobs)
        bump[b, t] = eps
        high, low = (loop_loss(logprobs + s * bump, *tensors[1:], aggregation, **SETTINGS) for s in (1, -1))
        assert gradient[b, t].item() == pytest.approx((high - low) / (2 * eps), abs=1e-8)


def test_clipping_by_hand():
    """One token, clip_eps 0.2: the objective, and whether a gradient (A * ratio) is left."""
    cases = [  # ratio, advantage, objective, gradient
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # better, and already likely enough
        (0.5, 2.0, 1.0, 1.0),  # better, and less likely than it was: pull
        (1.5, -2.0, -3.0, -3.0),  # worse, and likelier than it was: push
        (0.5, -2.0, -1.6, 0.0),  # worse, and already unlikely enough
    ]
    for ratio, advantage, objective, pull in cases:
        token, old, mask = tensor([[math.log(ratio)]]), tensor([[0.0]]), torch.ones(1, 1)
        loss, gradient, metrics = loss_and_gradient(token, old, None, tensor([advantage]), mask, kl_beta=0)
        assert (-loss.item(), -gradient.item()) == pytest.approx((objective, pull), abs=1e-12)
        assert metrics["clip_frac"] == (pull == 0) and metrics["kl"] == 0
        assert metrics["ratio_mean"] == metrics["ratio_max"] == pytest.approx(ratio)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_zero_loss_and_a_gradient_at_ratio_one(aggregation):
    """Policy = old = reference, answers of equal length: the loss is exactly 0, the gradient is not."""
    logprobs, mask = batch(rows=4)[0].detach(), torch.ones(4, 7, dtype=torch.bool)
    advantages = group_advantages(tensor([1, 3, 3, 1]), scale_rewards=False)
    loss, gradient, metrics = loss_and_gradient(logprobs, logprobs, logprobs, advantages, mask, aggregation)
    assert loss == 0.0 and metrics["kl"] == 0.0 and metrics["clip_frac"] == 0.0
    tokens = {"token-mean": 4 * 7, "sequence-mean": 4 * 7, "constant": 4 * MAX_TOKENS}[aggregation]
    assert (gradient == -(advantages / tokens)[:, None]).all() and (gradient != 0).all()


def test_unequal_lengths_at_ratio_one():
    """The loss is then -sum(A * length) / normalizer, but still 0 where every answer counts the same."""
    logprobs = batch(rows=2)[0].detach()
    mask = torch.arange(7) < torch.tensor([[6], [2]])
    advantages = tensor([1.0, -1.0])
    expected = {"token-mean": -(6 - 2) / 8, "sequence-mean": 0.0, "constant": -(6 - 2) / (2 * MAX_TOKENS)}
    for name in AGGREGATIONS:
        loss, _, _ = loss_and_gradient(logprobs, logprobs, None, advantages, mask, name, kl_beta=0)
        assert loss.item() == pytest.approx(expected[name], abs=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[8], [4, 4], [2] * 4, [1] * 8, [3, 5]], ids=str)
def test_micro_batches_add_up(aggregation, cuts):
    """1 x 8 = 2 x 4 = 8 x 1, also where each micro-batch is padded to its own longest answer."""
    tensors = batch()
    loss, gradient, metrics = loss_and_gradient(*tensors, aggregation)
    parts = list(zip(*[tensor.detach().split(cuts) for tensor in tensors], strict=True))
    normalizer = sum(loss_normalizer(part[-1], aggregation, MAX_TOKENS) for part in parts)
    total, gradients, sums = 0.0, [], dict.fromkeys(metrics, 0.0)
    for logprobs, old, ref, advantages, mask in parts:
        width = int(mask.sum(dim=1).max())
        trimmed = [x[:, :width] for x in (logprobs, old, ref)]
        part_loss, part_gradient, part_metrics = loss_and_gradient(
            *trimmed, advantages, mask[:, :width], aggregation, normalizer=normalizer
        )
        total += part_loss
        gradients.append(pad(part_gradient, (0, 7 - width)))
        largest = max(sums["ratio_max"], part_metrics["ratio_max"])
        sums = {name: sums[name] + value for name, value in part_metrics.items()} | {"ratio_max": largest}
    torch.testing.assert_close(total, loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(sums, metrics, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("junk", [0.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")])
def test_padding_has_no_effect(aggregation, junk):
    *tensors, advantages, mask = batch()
    loss, gradient, metrics = loss_and_gradient(*tensors, advantages, mask, aggregation)
    padded = [pad(x.detach().masked_fill(~mask, junk), (2, 3), value=junk) for x in tensors]
    padded_mask = pad(mask, (2, 3))
    other = loss_and_gradient(*padded, advantages, padded_mask, aggregation)
    torch.testing.assert_close(other[0], loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(other[1][:, 2:-3], gradient, rtol=1e-14, atol=0)
    assert (other[1][~padded_mask] == 0).all()
    torch.testing.assert_close(other[2], metrics, rtol=1e-14, atol=0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(advantage, dtype):
    ratios = torch.tensor([[1e4, -1e4, 100.0, -100.0, 0.0]], dtype=dtype)
    zeros = torch.zeros_like(ratios)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, gradient, metrics = loss_and_gradient(ratios, zeros, zeros, advantages, torch.ones(1, 5))
    assert loss.isfinite() and gradient.isfinite().all() and all(m.isfinite() for m in metrics.values())
    assert loss.dtype == dtype  # float64 advantages do not widen the loss


def test_old_and_reference_are_constants():
    """The policy's own tensor may stand for the old policy: the gradient is that of the policy alone."""
    logprobs, _, _, advantages, mask = batch()
    ref = 2 * logprobs  # in the graph, as if somebody had forgotten no_grad
    policy_loss(logprobs, logprobs, ref, advantages, mask, **SETTINGS, normalizer=1.0)[0].backward()
    slope = -advantages[:, None] + 0.05 * (1 - logprobs.exp())  # of -A * ratio and of k3, where ref - p = p
    torch.testing.assert_close(logprobs.grad, (slope * mask).detach())


def test_normalizers_and_means_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    values = tensor([[1, 2, 6], [5, 100, 100]])
    expected = {"token-mean": (4, 14 / 4), "sequence-mean": (2, (3 + 5) / 2), "constant": (20, 14 / 20)}
    for aggregation, (normalizer, mean) in expected.items():
        assert loss_normalizer(mask, aggregation, MAX_TOKENS) == normalizer
        assert masked_mean(values, mask, aggregation, normalizer).item() == pytest.approx(mean)


def test_metrics_by_hand():
    logprobs = tensor([[math.log(1.5), 0.0, 0.0], [math.log(0.5), 0.0, 9.0]])
    zeros, mask = torch.zeros_like(logprobs), torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages = tensor([1.0, -1.0])
    loss, metrics = policy_loss(logprobs, zeros, zeros, advantages, mask, **SETTINGS, normalizer=4)
    kl = (1 / 1.5 - 1 + math.log(1.5) + 2 - 1 + math.log(0.5)) / 4
    expected = {
        "policy_loss": -(1.2 + 1 + 1 - 0.8) / 4,
        "kl": kl,
        "ratio_mean": (1.5 + 1 + 1 + 0.5) / 4,
        "clip_frac": 2 / 4,
        "ratio_max": 1.5,
        "nll": -(math.log(1.5) + math.log(0.5)) / 4,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected["policy_loss"] + 0.05 * kl)
    assert not any(value.requires_grad for value in metrics.values())


def test_padding_is_not_the_largest_ratio():
    """All real tokens are less likely than before; the ratio on padding is 1."""
    logprobs, mask = tensor([[math.log(0.5), 0.0], [math.log(0.8), 0.0]]), torch.tensor([[1, 0], [1, 0]])
    old, advantages = torch.zeros_like(logprobs), tensor([1.0, -1.0])
    _, metrics = policy_loss(logprobs, old, None, advantages, mask, clip_eps=0.2, kl_beta=0, normalizer=2)
    assert metrics["ratio_max"].item() == pytest.approx(0.8)


def test_wrong_arguments_are_named():
    logprobs, old, ref, advantages, mask = batch()
    good = {"normalizer": 1.0, **SETTINGS}
    wrong = [
        ("old_logprobs is", (logprobs, old[:, 1:], ref, advantages, mask), {}),
        ("advantages", (logprobs, old, ref, advantages[:1], mask), {}),
        ("kl_beta is 0.05.*ref_logprobs", (logprobs, old, None, advantages, mask), {}),
        ("normalizer is 0", (logprobs, old, ref, advantages, mask), {"normalizer": 0.0}),
        ("'mean' is not one of token-mean", (logprobs, old, ref, advantages, mask), {"aggregation": "mean"}),
    ]
    for message, tensors, settings in wrong:
        with pytest.raises(ValueError, match=message):
            policy_loss(*tensors, **good | settings)
    with pytest.raises(ValueError, match="max_tokens is None"):
        loss_normalizer(mask, "constant")
