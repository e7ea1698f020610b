"""The metrics of spatio-temporal video grounding: from an answer to the paper's row (Tables 1-3).

A tube is a span and boxes, both on the native frames of the clip: ((first, stop), {frame: box in [0, 1]}),
the span half-open. What an answer says in steps becomes a tube first. With P and G for the predicted and the
true span, p_f and g_f for their boxes, F for the frames where boxes are judged:

    tIoU = |P and G| / |P or G|
    vIoU = sum of IoU(p_f, g_f) over f of F in P and G / number of f of F in P or G

Published tables disagree about G and F. A protocol is one choice of the two:

    protocol   who                             G, on native frames            F
    native     ours                            [first, stop)                  every frame
    stcat      STCAT, CG-STVG, TA-STVG: the    [first, last], read as if      every frame
               tables that the paper copies    `last` were exclusive
    tubedetr   TubeDETR, which the paper       [first, stop)                  5 a second, at most 200
               cites for its metrics

In these three vIoU leaves out the frames of the truth without a box, which still count in tIoU (the published
code drops such sentences or stops). Two newer protocols know a tube by its boxes, whose corners are sorted:

    protocol   who                             P and G, among the frames F    F
    vue        VUE-STG, the benchmark of       those with a box that has      one a second
               Vidi2                           an inside
    grid       PTD (Parallel Tube Decoding)    those with a box; in tIoU the  2 a second, 4 to 64
                                               whole of P, and G without gaps

An event that none of the frames F meets scores 0 there. `vue` also has "vIoU_common", the mean IoU over P and
G, which tells *where* from *when*. On clips of one frame a second, where every frame of both spans has a box,
tIoU and vIoU of `vue` are those of `native`.

In all of them a failed answer counts as 0, like any other. vIoU@R is the share of answers strictly above R;
in `grid` also of those at R.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from config import Config
from prompts import Answer, TextFormat, parse_answer, truth_answer
from rewards import area
from runtime.files import DataError
from samples import QUESTION_TYPES, Sample, Track

Tube = tuple[tuple[int, int], Track]  # native frames [first, stop) of the clip, and their boxes
Scores = dict[str, float]  # of one answer: "tIoU" and "vIoU" in [0, 1], "failures", 0 or 1; see vue_scores
Row = dict[str, "float | Row"]  # of a table: see summarize and score_tubes

TUBEDETR_FPS, TUBEDETR_FRAMES = 5, 200  # its code's fps and video_max_len
NOTHING: Tube = ((0, 0), Track(0, np.empty((0, 4))))
AREA_EDGES = tuple(k * k / 100 for k in range(11))  # STVG-o1, Fig. 4: shares of the frame's area
COLUMNS = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
# What not every row has: key in a row -> head in a table. VUE-STG calls m_vIoU_common v_IoU_Int.
CEILINGS = {"ceiling_m_tIoU": "best tIoU", "ceiling_m_vIoU": "best vIoU"}
EXTRAS = {"m_vIoU_common": "vIoU_Int"} | CEILINGS


def tube_from_answer(
    answer: Answer | None,
    sample: Sample,
    text_format: TextFormat,
    scale: tuple[int, int],
    which: str = "pred",
) -> Tube | None:
    """From steps to native frames; None for a failed answer: it did not parse, or ends before it starts.

    Step i covers the native frames of its cell, and its box belongs to the frame that was sampled (TimeGrid).
    Between sampled frames boxes are interpolated linearly, also across steps without a box; before the first
    and after the last one they are held. What lies beyond the clip's end is cut off: a span may become empty.
    Boxes of steps outside the answer's own span are ignored. Flipped boxes stay flipped: their IoU is 0.

    scale: (width, height) of the text's coordinates. which: the list of boxes, "pred" or "think".
    """
    items = answer and getattr(answer, which)
    if not items or answer.end < answer.start:
        return None
    grid = sample.grid(text_format.step_seconds)
    first, stop = grid.first_frame(answer.start), grid.first_frame(answer.end + 1)
    last_step = min(answer.end, grid.num_steps - 1)
    given = getattr(answer.in_frame(scale), f"{which}_boxes")
    steps = sorted(step for step in given if answer.start <= step <= last_step)
    frames = np.arange(first, stop)  # no longer than the clip, whatever numbers the answer holds
    boxes = np.full((len(frames), 4), np.nan)
    if steps:
        sampled = [grid.sampled_frame(step) for step in steps]
        for side in range(4):
            boxes[:, side] = np.interp(frames, sampled, [given[step][side] for step in steps])
    return (first, stop), Track(first, boxes)


def tube_of(prediction: dict | None, sample: Sample, config: Config, which: str = "pred") -> Tube | None:
    """The tube of a record, of its "pred" or "think" boxes; None for a failure. Raises DataError."""
    if prediction is None:
        return None
    answer = parse_answer(prediction["completion"], config.think)
    return tube_from_answer(answer, sample, config.text_format, scale_of(prediction, sample, config), which)


def scale_of(prediction: dict, sample: Sample, config: Config) -> tuple[int, int]:
    """(width, height) that the boxes of a record are measured in. Raises DataError."""
    if config.coordinates != "resized":
        return config.text_format.scale((0, 0), (sample.width, sample.height))
    match prediction.get("scale"):
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    what = '"scale": [width, height], the size in pixels of the frames that the model saw'
    raise DataError(f"prediction {sample.id!r}: with coordinates: resized each needs {what}")


def native_scores(tube: Tube | None, sample: Sample) -> Scores:
    """The protocol `native`: the truth as annotated, every native frame of the clip."""
    return _scores(tube, sample, range(sample.first_frame, sample.stop_frame), np.arange(sample.num_frames))


def stcat_scores(tube: Tube | None, sample: Sample) -> Scores:
    """The protocol `stcat`: the truth ends with the number of its last frame, the prediction with that of the
    frame after its last, and half-open formulas take both.

    HC-STVG: the truth's last frame earns nothing, and an answer that covers it pays for it: n frames found
    exactly have tIoU (n - 1) / n. VidSTG: their reader takes the exclusive temporal_gt.end_fid for the last
    frame, so the two slips cancel, except where the event reaches the end of the clip (there min() with the
    clip's last frame makes it HC-STVG's case).

    Source: STCAT datasets/hcstvg.py:169-170, vidstg.py:240-241, evaluation/*_eval.py (CG-STVG's is the same).
    """
    last = sample.stop_frame - 1 if sample.question_type is None else sample.stop_frame
    last = min(last, sample.num_frames - 1)
    return _scores(tube, sample, range(sample.first_frame, last), np.arange(sample.num_frames))


def tubedetr_scores(tube: Tube | None, sample: Sample) -> Scores:
    """The protocol `tubedetr`: tIoU as in `native`; boxes are judged at the frames TubeDETR would be shown.

    Their HC-STVG reader takes the 1-based st_frame for 0-based, so that the whole truth is a frame late; that
    is not copied. Source: TubeDETR datasets/{vidstg,hcstvg}_eval.py at 3c32cc9 (the union of earlier versions
    is too small).
    """
    return _scores(tube, sample, range(sample.first_frame, sample.stop_frame), tubedetr_frames(sample))


def vue_scores(tube: Tube | None, sample: Sample) -> Scores:
    """The protocol `vue`: the boxes of the first frame at or after each whole second of the clip.

    VUE-STG's truths have a box at each whole second; here the tubes are read there. Where both have one, the
    scores hold "vIoU_common", too. Source: vidi VUE_STG/evaluate.py at fc30c87: t_IoU, v_IoU and v_IoU_Int.
    """
    (_, boxes), seconds = tube or NOTHING, sample.grid(1.0)
    frames = np.array([seconds.first_frame(second) for second in range(seconds.num_steps)])
    p, g = _upright(boxes.rows(frames)), _upright(sample.boxes.rows(frames))  # (F, 4)
    in_p, in_g = ((b[:, 0] < b[:, 2]) & (b[:, 1] < b[:, 3]) for b in (p, g))  # (F,); a missing box is nan
    overlap, both = float(ious(p, g)[in_p & in_g].sum()), int((in_p & in_g).sum())
    scores = {"tIoU": _share(in_p, in_g), "vIoU": overlap / max(int((in_p | in_g).sum()), 1)}
    return scores | {"failures": int(tube is None)} | ({"vIoU_common": overlap / both} if both else {})


def grid_scores(tube: Tube | None, sample: Sample) -> Scores:
    """The protocol `grid`: the boxes of the frames that PTD's model is shown; the truth's in thousandths.

    Source: ParallelTubeDecoding data/prepare_*_eval.py and evaluation/lmms_eval/lmms_eval/tasks/*/utils.py at
    c6a63a7 (which leaves out the sentences of HC-STVG whose truth is on none of these frames).
    """
    ((first, stop), boxes), frames = tube or NOTHING, grid_frames(sample)
    p, g = _upright(boxes.rows(frames)), _upright(sample.boxes.rows(frames).round(3))  # (F, 4)
    in_p, in_g = (~np.isnan(b[:, 0]) for b in (p, g))  # (F,)
    event = np.maximum.accumulate(in_g) & np.maximum.accumulate(in_g[::-1])[::-1]  # first to last
    overlap = float(ious(p, g)[in_p & in_g].sum())
    scores = {"tIoU": _share(_within(frames, first, stop), event), "failures": int(tube is None)}
    return scores | {"vIoU": overlap / max(int((in_p | in_g).sum()), 1)}


def grid_frames(sample: Sample) -> np.ndarray:
    """The native frames of the clip, 0-based, that PTD's model is shown: 2 a second, at least 4 and at most
    64, evenly spaced from the first to the last; rounded in numbers of the whole file."""
    count = min(max(int(sample.num_frames / sample.fps * 2), 4), 64, sample.num_frames)
    places = np.arange(count) * (sample.num_frames - 1) / max(count - 1, 1)
    return np.round(sample.begin_frame + places).astype(int) - sample.begin_frame


PROTOCOLS = {
    "native": native_scores,
    "stcat": stcat_scores,
    "tubedetr": tubedetr_scores,
    "vue": vue_scores,
    "grid": grid_scores,
}
AT_LEAST = ("grid",)  # the protocols whose vIoU@R holds R


def _upright(boxes: np.ndarray) -> np.ndarray:
    """Boxes (F, 4) with their corners sorted."""
    return np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)


def _share(a: np.ndarray, b: np.ndarray) -> float:
    """Of the frames in a or in b the share of those in both; (F,) and (F,) bool."""
    return int((a & b).sum()) / max(int((a | b).sum()), 1)


def tubedetr_frames(sample: Sample) -> np.ndarray:
    """The native frames of the clip, 0-based, that TubeDETR is shown: 5 a second, at most 200.

    The first one, then each f with int(f * 5 / fps) above that of the one before, in numbers of the whole
    file; never the clip's last frame; of more than 200, 200 evenly spaced. Their code refuses files with
    fewer than 5 frames a second; here all but the last frame are kept.
    """
    begin = sample.begin_frame
    rate = TUBEDETR_FPS / sample.fps  # rounded before it multiplies, as theirs is: the whole part can tell
    fifths = (np.arange(begin, begin + max(sample.num_frames - 1, 1)) * rate).astype(int)
    kept = np.append(0, np.flatnonzero(np.diff(fifths)) + 1)
    if len(kept) > TUBEDETR_FRAMES:
        kept = kept[np.arange(TUBEDETR_FRAMES) * len(kept) // TUBEDETR_FRAMES]
    return kept


def _scores(tube: Tube | None, sample: Sample, truth: range, frames: np.ndarray) -> Scores:
    """The two formulas. truth: G; frames: F; both on native frames of the clip.

    truth may be empty (`stcat` and an event of one frame); then the scores are 0, as in the published code.
    That code divides by the hull of P and G: their union where they meet, and where not the scores are 0.
    """
    if tube is None:
        return {"tIoU": 0.0, "vIoU": 0.0, "failures": 1}
    (first, stop), boxes = tube
    common = range(max(first, truth.start), min(stop, truth.stop))
    union = stop - first + len(truth) - len(common)

    frames = frames[_within(frames, min(first, truth.start), max(stop, truth.stop))]  # (F,): no others count
    true_boxes = sample.boxes.rows(frames)  # (F, 4)
    holes = _within(frames, sample.first_frame, sample.stop_frame) & np.isnan(true_boxes[:, 0])
    judged = (_within(frames, first, stop) | _within(frames, truth.start, truth.stop)) & ~holes
    both = _within(frames, common.start, common.stop) & judged
    overlap = sum(ious(boxes.rows(frames[both]), true_boxes[both]).tolist())
    return {"tIoU": len(common) / max(union, 1), "vIoU": overlap / max(int(judged.sum()), 1), "failures": 0}


def _within(frames: np.ndarray, first: int, stop: int) -> np.ndarray:
    return (frames >= first) & (frames < stop)


def ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """rewards.iou of the rows of two arrays, (N, 4) -> (N,), to the last bit; 0 where a box is missing."""
    widths, heights = (np.minimum(a, b)[:, 2 + k] - np.maximum(a, b)[:, k] for k in (0, 1))
    shared = np.maximum(widths, 0.0) * np.maximum(heights, 0.0)
    sides_a, sides_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]  # (N, 2)
    union = sides_a.prod(axis=1) + sides_b.prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros(len(a)), where=shared > 0)  # a flipped box shares nothing


def summarize(scores: list[Scores], protocol: str = "native") -> Row:
    """The row of a table, in percent, over ALL sentences (N and failures are counts); "m_vIoU_common" over
    those that have it, if any. Raises ValueError for no scores."""
    if not scores:
        raise ValueError("no scores to summarize: the split is empty")
    tious, vious = (np.array([score[name] for score in scores]) for name in ("tIoU", "vIoU"))
    above = np.greater_equal if protocol in AT_LEAST else np.greater
    shares = (tious, vious, above(vious, 0.3), above(vious, 0.5))  # in the order of COLUMNS
    row = {name: 100 * float(values.mean()) for name, values in zip(COLUMNS, shares, strict=True)}
    common = [score["vIoU_common"] for score in scores if "vIoU_common" in score]
    row |= {"m_vIoU_common": 100 * float(np.mean(common))} if common else {}
    return row | {"N": len(scores), "failures": sum(score["failures"] for score in scores)}


def score_tubes(tubes: Iterable[Tube | None], samples: list[Sample]) -> dict[str, Row]:
    """protocol -> row; for VidSTG it holds the rows of its "declarative" and "interrogative" sentences, too.

    tubes: one for each sample, in order; taken one at a time, for VidSTG's 10,303 test sentences would fill
    0.7 GB. Raises ValueError for no samples, and for more or fewer tubes than samples.
    """
    return _rows([_by_protocol(*pair) for pair in zip(tubes, samples, strict=True)], samples)


def _by_protocol(tube: Tube | None, sample: Sample) -> dict[str, Scores]:
    return {name: protocol(tube, sample) for name, protocol in PROTOCOLS.items()}


def _rows(scores: list[dict[str, Scores]], samples: list[Sample]) -> dict[str, Row]:
    rows = {name: summarize([score[name] for score in scores], name) for name in PROTOCOLS}
    for kind in QUESTION_TYPES:
        chosen = [n for n, sample in enumerate(samples) if sample.question_type == kind]
        for name in PROTOCOLS if chosen else ():
            rows[name][kind] = summarize([scores[n][name] for n in chosen], name)
    return rows


def whole_step_scores(samples: list[Sample], text_format: TextFormat) -> dict[str, dict[str, Row]]:
    """What answers in whole steps reach: "best" and "taught" -> rows as of score_tubes.

    best: the most, of tIoU and of vIoU, on the spans whose edges are next to those of the truth, with its
    boxes. It is below 100 where truths begin and end between steps, and where boxes do not move evenly. (Of a
    truth with holes `vue` and `grid` may give more to a shorter span.)
    taught: the answer with the full reward (Sample.truth), which supervised fine-tuning teaches.
    """
    best, taught, scale = [], [], (1000, 1000)
    for sample in samples:
        grid = sample.grid(text_format.step_seconds)
        scores = {}
        # `stcat` has the truth end a frame earlier.
        stops = {sample.stop_frame, max(sample.stop_frame - 1, sample.first_frame + 1)}
        for span in {span for stop in stops for span in grid.spans_near(sample.first_frame, stop)}:
            answer = truth_answer(sample.truth(text_format.step_seconds, span), scale, think=False)
            scores[span] = _by_protocol(tube_from_answer(answer, sample, text_format, scale), sample)
        taught.append(scores[grid.steps_of(sample.first_frame, sample.stop_frame)])
        best.append({name: _largest([score[name] for score in scores.values()]) for name in PROTOCOLS})
    return {"best": _rows(best, samples), "taught": _rows(taught, samples)}


def _largest(scores: list[Scores]) -> Scores:
    return {key: max(score[key] for score in scores) for key in ("tIoU", "vIoU", "failures")}


def score_answers(
    tubes: Iterable[Tube | None], samples: list[Sample], text_format: TextFormat
) -> dict[str, Row]:
    """score_tubes, each row with the best that whole steps allow, "ceiling_m_tIoU" and "ceiling_m_vIoU"."""
    rows, best = score_tubes(tubes, samples), whole_step_scores(samples, text_format)["best"]
    for name, row in rows.items():
        kinds = [kind for kind in QUESTION_TYPES if kind in row]
        for part, most in [(row, best[name]), *((row[kind], best[name][kind]) for kind in kinds)]:
            part |= {key: most[key.removeprefix("ceiling_")] for key in CEILINGS}
    return rows


def viou_by_area(samples: list[Sample], scores: dict[str, list[Scores]]) -> list[dict]:
    """Mean vIoU by how large the subject is (STVG-o1, Fig. 4): the mean area of its true boxes, as a share of
    the frame.

    scores: by a name, such as "think" and "pred", those of one answer for each sample, in order. Returns for
    each bin of AREA_EDGES {"low", "high", "N": samples in it, NAME: mean vIoU in percent, None where N is 0};
    a bin holds its lower edge, the last one also its upper.
    """
    areas = [np.mean([area(box) for box in sample.boxes.values()]) for sample in samples]
    places, bins = np.digitize(areas, AREA_EDGES[1:-1]), []  # places: (N,), 0 to 9
    for k, (low, high) in enumerate(pairwise(AREA_EDGES)):
        inside = np.flatnonzero(places == k)
        vious = {name: [values[n]["vIoU"] for n in inside] for name, values in scores.items()}
        means = {name: 100 * float(np.mean(v)) if v else None for name, v in vious.items()}
        bins.append({"low": low, "high": high, "N": len(inside)} | means)
    return bins


def format_table(rows: dict[str, Row]) -> str:
    """The paper's columns for named rows, with N, the share of failed answers and the grid's ceiling; below a
    row those of its question types. Raises ValueError for a row whose vIoU@0.5 is above its vIoU@0.3."""
    lines = {}
    for name, row in rows.items():
        lines |= {name: row} | {f"{name} {kind}": row[kind] for kind in QUESTION_TYPES if kind in row}
    width = max(12, *map(len, lines))
    extras = {key: head for key, head in EXTRAS.items() if any(key in row for row in lines.values())}
    heads = (*COLUMNS, "N", "failed", *extras.values())
    table = [" " * width + "".join(f"{head:>10}" for head in heads)]
    for name, row in lines.items():
        if not row["vIoU@0.5"] <= row["vIoU@0.3"]:
            raise ValueError(f"{name}: vIoU@0.5 {row['vIoU@0.5']} is above vIoU@0.3 {row['vIoU@0.3']}")
        cells = [f"{row[key]:.1f}" for key in COLUMNS] + [f"{row['N']}", f"{row['failures'] / row['N']:.1%}"]
        cells += [f"{row[key]:.1f}" if key in row else "-" for key in extras]
        table.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(table)


def think_gain(predictions: list[dict], samples: list[Sample], config: Config) -> dict | None:
    """What the final boxes gain over the thinking boxes on the same spans, in vIoU of the protocol `native`.

    Only answers that parse and have both lists count; None if there is none. Returns "N" of them; in percent
    "m_vIoU_think", "m_vIoU_pred", their difference "gain" and its standard error (None for N = 1), and the
    shares of answers whose final boxes are "better", "worse" or "equal".
    """
    by_id, vious = {sample.id: sample for sample in samples}, []
    for prediction in predictions:
        answer = parse_answer(prediction["completion"], config.think)
        if answer and answer.think:
            sample = by_id[prediction["id"]]
            tubes = (tube_of(prediction, sample, config, which) for which in ("think", "pred"))
            vious.append([native_scores(tube, sample)["vIoU"] for tube in tubes])
    if not vious:
        return None
    think, pred = 100 * np.array(vious).T  # (N,), (N,)
    gains, count = pred - think, len(vious)
    means = {"m_vIoU_think": think, "m_vIoU_pred": pred, "gain": gains}
    means = {name: float(values.mean()) for name, values in means.items()}
    error = float(gains.std(ddof=1) / count**0.5) if count > 1 else None
    shares = {"better": gains > 0, "worse": gains < 0, "equal": gains == 0}
    shares = {name: 100 * float(share.mean()) for name, share in shares.items()}
    return {"N": count, **means, "standard_error": error, **shares}


def format_gain(gain: dict) -> str:
    """think_gain's numbers as a line below the table."""
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.2f} (standard error)"
    return (
        f"m_vIoU (native) of thinking boxes {gain['m_vIoU_think']:.1f}, of final boxes"
        f" {gain['m_vIoU_pred']:.1f}, gain {gain['gain']:+z.2f}{error}; of {gain['N']} answers"
        f" {gain['better']:.1f}% gain, {gain['worse']:.1f}% lose, {gain['equal']:.1f}% stay"
    )
