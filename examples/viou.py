"""The metric itself as a reward: rewards: {examples/viou.py:viou: 1}."""

from rewards import MISSING, common_steps, iou


def viou(answer, truth):
    """Sum of IoU over the common steps / steps of the union of the spans, in [0, 1]. Unlike the spatial
    reward (Eq. 7), a mean over the common steps, it pays less for each step that is left out."""
    pairs = [(answer.pred_boxes.get(i, MISSING), truth.boxes[i]) for i in common_steps(answer, truth)]
    union = max(answer.end, truth.span[1]) - min(answer.start, truth.span[0]) + 1
    return sum(iou(box, true_box) for box, true_box in pairs) / union
