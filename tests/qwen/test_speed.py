"""qwen/speed.py against the forwards of transformers."""

import torch


def test_the_fast_vision_tower_changes_no_number(policy, checkpoints):
    """Values and gradients, for two videos and, in Qwen2.5, windows of several sizes."""
    family = policy.model.config.model_type
    stock = type(policy.model).from_pretrained(checkpoints[family], attn_implementation="sdpa")
    slow, fast = stock.model.visual, policy.model.model.visual
    with torch.no_grad():
        for parameter in slow.parameters():  # biases, too
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    fast.load_state_dict(slow.state_dict())
    grid = torch.tensor([[3, 14, 24], [2, 4, 4]])
    side = policy.patch_size
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * side * side, generator=generator)
    levels = []
    for tower in (slow, fast):
        out = tower(patches, grid_thw=grid)
        levels.append([out.pooler_output, *getattr(out, "deepstack_features", [])])
        sum(level.pow(2).sum() for level in levels[-1]).backward()
    torch.testing.assert_close(*levels, atol=2e-5, rtol=1e-5)
    for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4 * float(a.grad.abs().max()), rtol=1e-3)
