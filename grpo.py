"""Group Relative Policy Optimisation (GRPO) on plain tensors (STVG-o1, section 3.3).

Advantages say how much better each answer is than its group; the loss makes the better answers likelier.
Nothing here knows a model, a text or a video.

Shapes: G completions of one prompt; B rows (completions of one or more prompts) of C tokens.

The paper gives Eq. 11 and Eq. 12. The rest is done as in verl, the framework that the authors used:

- standard deviation of the group: the sample's (n - 1), plus 1e-6;
- importance ratio: one per token (the paper writes one per answer);
- clipping: 1 +- clip_eps on both sides (verl: 0.2). verl's second clip, at ratio 3 for negative advantages,
  is not in Eq. 12 and is left out;
- KL: estimator k3, in the loss, with the log-ratio clamped to +-20. verl also clamps the estimate at 10,
  which stops the gradient of the tokens that have drifted furthest; we do not;
- aggregation: "token-mean", every token of the global batch weighs the same.

Why is my loss 0? GRPO's loss does not measure progress. With one update per batch every ratio is 1, and the
loss is -sum(A * length) / normalizer + kl_beta * KL. The advantages of a group sum to zero, so without KL and
with answers of equal length (or with "sequence-mean") the loss is 0. Its gradient is not: it is -A /
normalizer for the log-prob of each token. A group whose rewards are all equal has no advantages; only the KL
is left then.
"""

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "sequence-mean", "constant")
STD_EPS = 1e-6  # Eq. 11
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond anything sensible, and finite in every dtype but float16


def group_advantages(rewards: Tensor, scale_rewards: bool = True) -> Tensor:
    """How much better each answer is than its group (Eq. 11).

    rewards: (G,) totals of the G answers to one prompt. Returns (G,) float64: (reward - mean) / (std + 1e-6),
    or reward - mean without scale_rewards. Equal rewards, and a group of one, give exact zeros. Raises
    ValueError unless there is at least one reward and all are finite.
    """
    rewards = rewards.detach().double()
    if rewards.dim() != 1 or len(rewards) == 0 or not rewards.isfinite().all():
        raise ValueError(f"rewards: one finite number for each answer is needed, not {rewards.tolist()}")
    centred = rewards - rewards[0]  # equal rewards become exact zeros, whatever their mean rounds to
    advantages = centred - centred.mean()
    if not scale_rewards or len(rewards) == 1:
        return advantages
    return advantages / (advantages.std(correction=1) + STD_EPS)  # Eq. 11


def clamped_log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log(p / q), clamped to +-20, and before exp: after it, 0 * inf would make the gradient NaN."""
    return (logprobs - other_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token, >= 0: k3 of joschu.net/blog/kl-approx.html

    logprobs, ref_logprobs: of the sampled tokens, in one shape, which the result has too.
    """
    log_ratio = clamped_log_ratio(ref_logprobs, logprobs)
    k3 = torch.expm1(log_ratio) - log_ratio  # exp(x) - 1 - x, without its rounding error near 0
    return k3.clamp(min=0.0)  # expm1 may be off by one unit in the last place


def loss_normalizer(mask: Tensor, aggregation: str, max_tokens: int | None = None) -> float:
    """What the loss is divided by; sum it over micro-batches and ranks.

    mask: (B, C), true on completion tokens. max_tokens: the length that "constant" assumes (max_new_tokens).
    """
    if aggregation == "token-mean":
        return float(mask.bool().sum())
    if aggregation == "sequence-mean":
        return float(len(mask))
    if aggregation == "constant":
        if not max_tokens or max_tokens < 1:
            raise ValueError(f"aggregation constant: max_tokens is {max_tokens}, must be at least 1")
        return float(len(mask) * max_tokens)
    raise ValueError(f"aggregation: {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")


def masked_mean(values: Tensor, mask: Tensor, aggregation: str, normalizer: float) -> Tensor:
    """(B, C) values -> a scalar: what these rows contribute to the mean over the global batch."""
    rows = (values * mask).sum(dim=1)  # (B,)
    if aggregation == "sequence-mean":
        rows = rows / mask.sum(dim=1).clamp(min=1)  # each answer counts the same, whatever its length
    elif aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    return rows.sum() / normalizer


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_eps: float,
    kl_beta: float,
    normalizer: float,
    aggregation: str = "token-mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss: minus the clipped objective, plus kl_beta times the KL (Eq. 12).

    logprobs      (B, C) of the sampled tokens under the policy, with gradient
    old_logprobs  (B, C) under the policy that sampled them; with one update per batch, logprobs itself
    ref_logprobs  (B, C) under the frozen reference, or None if kl_beta is 0
    advantages    (B,)   one for all tokens of a row
    mask          (B, C) true on completion tokens, the end token included; values elsewhere have no effect
    normalizer    the sum of loss_normalizer over the global batch, so that the losses (and gradients) of
                  micro-batches add up to those of the batch. If gradients are averaged over ranks, as DDP and
                  FSDP do, multiply the loss by the number of ranks.

    Returns the scalar loss and detached metrics: "policy_loss", "kl", "ratio_mean", "clip_frac" (share of
    tokens where clipping took hold) and "nll" (-logprobs), which add up as the loss does ("constant": per
    constant length), and "ratio_max", of which the largest counts. Raises ValueError for shapes that do not
    agree, for kl_beta without a reference, and for an empty batch.
    """
    _check_shapes(logprobs, old_logprobs, ref_logprobs, advantages, mask)
    if kl_beta and ref_logprobs is None:
        raise ValueError(f"kl_beta is {kl_beta}: the KL needs ref_logprobs (or set kl_beta: 0)")
    if not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}: the batch has no completion token to learn from")
    mask = mask.bool()
    logprobs = logprobs.where(mask, 0.0)  # before exp: padding reaches neither loss nor gradient
    old_logprobs = old_logprobs.detach().where(mask, 0.0)
    advantages = advantages.detach().to(logprobs.dtype).unsqueeze(1)  # (B, 1)

    ratio = torch.exp(clamped_log_ratio(logprobs, old_logprobs))  # (B, C), above 0; 1 on padding
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # Eq. 12, first part
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        kl = kl_k3(logprobs, ref_logprobs.detach().where(mask, 0.0))  # Eq. 12, second part

    values = {
        "policy_loss": -objective,
        "kl": kl,
        "ratio_mean": ratio,
        "clip_frac": (clipped * advantages < ratio * advantages).to(ratio.dtype),
    }
    means = {name: masked_mean(value, mask, aggregation, normalizer) for name, value in values.items()}
    loss = means["policy_loss"] + kl_beta * means["kl"]  # Eq. 12
    metrics = {name: mean.detach() for name, mean in means.items()}
    metrics["nll"] = -logprobs.detach().sum() / normalizer
    return loss, metrics | {"ratio_max": ratio.detach().where(mask, 0.0).max()}


def _check_shapes(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor
) -> None:
    """Raise ValueError for other shapes, of which broadcasting would silently make some loss."""
    wanted = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "mask": mask}
    for name, tensor in wanted.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} but logprobs {tuple(logprobs.shape)}")
    if logprobs.dim() != 2 or advantages.shape != logprobs.shape[:1]:
        shapes = f"logprobs {tuple(logprobs.shape)} and advantages {tuple(advantages.shape)}"
        raise ValueError(f"{shapes}: (B, C) and (B,) are needed")
