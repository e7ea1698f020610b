"""A track of boxes, written as a dict."""

import numpy as np

from samples import Track


def track_of(boxes):
    """boxes: frame -> box, of one frame at least."""
    first, last = min(boxes), max(boxes)
    return Track(first, np.array([boxes.get(frame, [np.nan] * 4) for frame in range(first, last + 1)]))
