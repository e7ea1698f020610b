"""The reward of OneThinker (arXiv 2512.03043) and EasyVideoR1 (arXiv 2604.16893) for this task:

rewards: {examples/onethinker.py:onethinker: 1}
"""

from rewards import iou, temporal_reward


def onethinker(answer, truth):
    """Half temporal IoU, half the mean IoU over the steps for which both have a box, in [0, 1]. What a list
    leaves out costs nothing, and of its steps the span is not asked (mean_iou_over_intersection in both)."""
    ious = [iou(box, truth.boxes[step]) for step, box in answer.pred_boxes.items() if step in truth.boxes]
    return temporal_reward(answer, truth) / 2 + sum(ious) / max(len(ious), 1) / 2
