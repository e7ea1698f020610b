"""Two guards against weak spots of the paper's reward; not in the paper. Name them in a configuration:

    rewards: {examples/guards.py:no_overlap: 1.0, examples/guards.py:missed_steps: 1.0}

`python -m lab.exploits` shows which cheats each of them stops, and which it opens.
"""

from rewards import common_steps, spatial_reward


def no_overlap(answer, truth):
    """-1 for each list of boxes if answer and truth share no step. In the paper that earns 0, which is more
    than boxes on the wrong person do."""
    lists = 1 if answer.think is None else 2
    return 0.0 if common_steps(answer, truth) else -1.0 * lists


def missed_steps(answer, truth):
    """What changes in the mean of GIoU - L1 of each list of boxes if every true step that the answer leaves
    out counts as -1 in it: one easy step then no longer pays. Without a common step it is no_overlap."""
    common = common_steps(answer, truth)
    if not common:
        return no_overlap(answer, truth)
    missed = sum(truth.span[0] <= step <= truth.span[1] for step in truth.boxes) - len(common)
    means = [spatial_reward(answer, truth, which) for which in ("think", "pred")[answer.think is None :]]
    return sum((mean * len(common) - missed) / (len(common) + missed) - mean for mean in means)
