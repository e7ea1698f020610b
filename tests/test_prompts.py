"""The answer's grammar, the coordinates of its boxes, and the prompt that describes them."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear import assert_linear

from prompts import (
    COORDINATES,
    Answer,
    TextFormat,
    build_prompt,
    format_answer,
    from_text_box,
    parse_answer,
    to_text_box,
    truth_answer,
    where_it_fails,
)
from samples import Truth

PAPER = (  # Fig. 2
    "<time> 5 - 7 </time>"
    " <think_bbox> 5. [271, 30, 395, 212], 6. [267, 24, 393, 216], 7. [270, 18, 395, 221] </think_bbox>"
    " <pred_bbox> 5. [278, 35, 399, 234], 6. [289, 34, 403, 236], 7. [300, 28, 405, 237] </pred_bbox>"
)
PAPER_ANSWER = Answer(
    5,
    7,
    ((5, (271, 30, 395, 212)), (6, (267, 24, 393, 216)), (7, (270, 18, 395, 221))),
    ((5, (278, 35, 399, 234)), (6, (289, 34, 403, 236)), (7, (300, 28, 405, 237))),
)


def test_the_papers_example_both_ways():
    assert parse_answer(PAPER) == PAPER_ANSWER
    assert format_answer(PAPER_ANSWER) == PAPER


def test_without_thinking_boxes():
    text = "<time> 5 - 5 </time> <pred_bbox> 5. [1, 2, 3, 4] </pred_bbox>"
    answer = Answer(5, 5, None, ((5, (1, 2, 3, 4)),))
    assert parse_answer(text, think=False) == answer and format_answer(answer) == text
    assert parse_answer(text) is None and parse_answer(PAPER, think=False) is None


@pytest.mark.parametrize(
    "text",
    [
        PAPER.replace(" ", ""),
        PAPER.replace(" ", "\n\t "),
        "\n  " + PAPER + " \r\n",
        PAPER.replace("</time> ", "</time>\n\n"),
        PAPER.replace(",", " , ").replace(".", " . ").replace("[", "[ ").replace("]", " ]"),
    ],
)
def test_white_space_is_free(text):
    assert parse_answer(text) == PAPER_ANSWER


BOX = "5. [1, 2, 3, 4]"
MALFORMED = {
    "empty": "",
    "prose": "The person walks in at step 5.",
    "before": "Answer: " + PAPER,
    "after": PAPER + ".",
    "twice": PAPER + PAPER,
    "between": PAPER.replace("</time> ", "</time> then "),
    "no time": PAPER.split("</time> ")[1],
    "no think": re.sub("<think_bbox>.*</think_bbox> ", "", PAPER),
    "no pred": PAPER.split("<pred_bbox>")[0],
    "think after pred": re.sub(r"(<think.*?_bbox>) (<pred.*_bbox>)", r"\2 \1", PAPER),
    "time last": re.sub(r"(<time>.*</time>) (.*)", r"\2 \1", PAPER),
    "unclosed": PAPER[:-1],
    "cut off": PAPER[: len(PAPER) // 2],
    "upper case": PAPER.replace("<time>", "<TIME>"),
    "tag attribute": PAPER.replace("<time>", "<time >"),
    "empty list": re.sub("<pred_bbox>.*</pred_bbox>", "<pred_bbox> </pred_bbox>", PAPER),
    "trailing comma": PAPER.replace(" </pred_bbox>", ", </pred_bbox>"),
    "no comma": PAPER.replace("], 6", "] 6"),
    "three numbers": PAPER.replace("30, 395, 212", "395, 212"),
    "five numbers": PAPER.replace("30, 395, 212", "30, 395, 212, 5"),
    "round brackets": PAPER.replace("[", "(").replace("]", ")"),
    "negative": PAPER.replace("[271", "[-271"),
    "decimal": PAPER.replace("[271", "[27.1"),
    "six digits": PAPER.replace("[271", "[000271"),
    "space in a number": PAPER.replace("[271", "[2 71"),
    "Arabic digits": PAPER.replace("[271", "[\u0662\u0667\u0661"),
    "superscript": PAPER.replace("[271", "[27\u00b9"),
    "en dash": PAPER.replace("5 - 7", "5 \u2013 7"),
    "one time": PAPER.replace("5 - 7", "5"),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_text_is_none(text):
    assert parse_answer(text) is None


def test_numbers_are_read_as_they_stand():
    """Nothing is sorted or repaired, and five digits are the most."""
    boxes = "<think_bbox>7.[9,8,7,6]</think_bbox><pred_bbox>3.[99999,0,0,1]</pred_bbox>"
    answer = Answer(99999, 0, ((7, (9, 8, 7, 6)),), ((3, (99999, 0, 0, 1)),))
    assert parse_answer("<time>99999-00000</time>" + boxes) == answer


number = st.integers(0, 99999)
box_list = st.lists(st.tuples(number, st.tuples(number, number, number, number)), min_size=1, max_size=6)
answers = st.builds(Answer, number, number, st.none() | box_list.map(tuple), box_list.map(tuple))


@given(answers)
def test_parse_is_the_inverse_of_format(answer):
    assert parse_answer(format_answer(answer), think=answer.think is not None) == answer


TOKENS = ["<time>", "</time>", "<think_bbox>", "</think_bbox>", "<pred_bbox>", "</pred_bbox>"]
TOKENS += [*"0123456789.,[]- \n<>/", "5", "12", "99999", "100000", BOX, ", " + BOX, "5 - 7"]


def slow_parse(text, think):
    """The grammar a second time, by a reader of tokens without regular expressions but for a token."""
    tokens = [token for token in re.findall(r"</?\w+>|[0-9]+|\s+|.", text, re.S) if not token.isspace()]
    position = 0

    def take(wanted=None):
        nonlocal position
        token = tokens[position]  # an IndexError is an answer that ends too early
        position += 1
        if not (token == wanted if wanted else set(token) <= set("0123456789") and len(token) <= 5):
            raise ValueError
        return token

    def take_list(tag):
        items, separator = [], f"<{tag}>"
        while separator != f"</{tag}>":
            take(separator)
            step = int(take())
            values = [int(take()) for mark in (".[", ",", ",", ",") if [take(m) for m in mark]]
            take("]")
            items.append((step, tuple(values)))
            separator = "," if tokens[position] == "," else f"</{tag}>"
        take(separator)
        return tuple(items)

    try:
        take("<time>")
        start, _, end, _ = int(take()), take("-"), int(take()), take("</time>")
        lists = [take_list(tag) for tag in (["think_bbox"] if think else []) + ["pred_bbox"]]
        return Answer(start, end, lists[0] if think else None, lists[-1]) if position == len(tokens) else None
    except (ValueError, IndexError):
        return None


def check_against_the_slow_parser(text, think):
    assert parse_answer(text, think) == slow_parse(text, think)
    fault = where_it_fails(text, think)
    assert (fault == "") == (slow_parse(text, think) is not None)
    if place := re.match("at character ([0-9]+)", fault):  # so far, the text is the beginning of an answer
        assert where_it_fails(text[: int(place[1]) - 1], think).startswith("the text ends after ")


def edit(text, edits):
    for place, length, token in edits:
        place = place % (len(text) + 1)
        text = text[:place] + token + text[place + length :]
    return text


one_edit = st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(["", *TOKENS]))
edits = st.lists(one_edit, max_size=3)


@given(edits, st.booleans(), st.booleans())
def test_edited_answers_parse_as_the_slow_parser_says(changes, has_think, think):
    text = edit(PAPER if has_think else re.sub("<think_bbox>.*</think_bbox>", "", PAPER), changes)
    check_against_the_slow_parser(text, think)


@given(st.text() | st.lists(st.sampled_from(TOKENS), max_size=60).map("".join), st.booleans())
def test_no_text_raises(text, think):
    check_against_the_slow_parser(text, think)


def test_where_an_answer_fails():
    """A mark in the place of any token of an answer is found there; the answer cut off anywhere has ended."""
    tokens = list(re.finditer(r"</?\w+>|[0-9]+|[^\s0-9]", PAPER))
    assert len(tokens) == 5 + 2 * (2 + 3 * 11 + 2)
    for token in tokens:
        text = PAPER[: token.start()] + "!" + PAPER[token.end() :]
        assert where_it_fails(text).startswith(f"at character {token.start() + 1}")
    assert all(where_it_fails(PAPER[:n]).startswith("the text ends after ") for n in range(len(PAPER)))
    end = f"at character {len(PAPER) + 1}, after '00, 28, 405, 237] </pred_bbox>'"
    assert where_it_fails(PAPER + "\ud800") == end + r": the end was expected, found '\ud800'"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("6. [267", "the man [267", "a box such as 5. [1, 2, 3, 4] was expected, found 'the man [267"),
        ("395, 212]", "395]", "a comma was expected, found '], 6"),
        ("271", "-271", "an integer from 0 to 99999 was expected, found '-271"),
        ("], 6", "] 6", "a comma or '</think_bbox>' was expected, found '6."),
        ("</time> ", "</time> so ", "'<think_bbox>' was expected, found 'so <think"),
        ("6.", "6", "a full stop was expected, found '[267"),
    ],
)
def test_what_was_expected(old, new, found):
    assert found in where_it_fails(PAPER.replace(old, new, 1))


HEAD = "<time> 5 - 7 </time> <think_bbox> "
HOSTILE = {
    "spaces": lambda n: HEAD + " " * n,
    "spaces inside": lambda n: (HEAD + BOX + " ,") + " " * n + "!",
    "newlines": lambda n: "\n" * n + "x" + "\n" * n,
    "digits": lambda n: "<time> " + "9" * n,
    "boxes without end": lambda n: HEAD + ", ".join([BOX] * (n // 17)),
    "boxes, wrong end": lambda n: HEAD + ", ".join([BOX] * (n // 17)) + "</pred_bbox>",
    "brackets": lambda n: HEAD + "5. " + "[" * n,
    "commas": lambda n: HEAD + BOX + "," * n,
    "open tags": lambda n: "<time>" * (n // 6),
    "answers": lambda n: PAPER * (n // len(PAPER)),
    "spaced boxes": lambda n: HEAD + " , ".join(["5 . [ 1 , 2 , 3 , 4 ]"] * (n // 24)) + "?",
    "valid": lambda n: HEAD + BOX + "</think_bbox><pred_bbox>" + ",".join([BOX] * (n // 16)) + "</pred_bbox>",
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_time_is_linear_in_the_text(hostile):
    assert_linear(parse_answer, hostile)
    assert_linear(where_it_fails, hostile)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(-1, 7, None, ((5, (1, 2, 3, 4)),)),
        Answer(5, 100000, None, ((5, (1, 2, 3, 4)),)),
        Answer(5, 7, None, ()),
        Answer(5, 7, (), ((5, (1, 2, 3, 4)),)),
        Answer(5, 7, None, ((5, (1, 2, 3, float("nan"))),)),
    ],
)
def test_what_cannot_be_written_is_refused(answer):
    with pytest.raises(ValueError, match=r"cannot be written|at least one box"):
        format_answer(answer)


def test_text_boxes_by_hand():
    assert to_text_box((0.25, 0.5, 0.7504, 1.0), (1000, 1000)) == (250, 500, 750, 1000)
    assert to_text_box((0.25, 0.5, 0.75, 1.0), (336, 188)) == (84, 94, 252, 188)
    assert from_text_box((84, 94, 252, 188), (336, 188)) == (0.25, 0.5, 0.75, 1.0)
    assert from_text_box((99999, 0, 1001, 1000), (1000, 1000)) == (1.0, 0.0, 1.0, 1.0)


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), st.tuples(*[st.floats(0, 1)] * 4))
def test_text_boxes_round_trip(scale, shares):
    box = tuple(round(share * scale[k % 2]) for k, share in enumerate(shares))
    assert to_text_box(from_text_box(box, scale), scale) == box


def test_scales():
    shown, file = (336, 196), (1280, 720)
    scales = {c: TextFormat(coordinates=c).scale(shown, file) for c in COORDINATES}
    assert scales == {"norm1000": (1000, 1000), "resized": (336, 196), "original": (1280, 720)}


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"coordinates": "pixels"}, "coordinates: 'pixels'.*norm1000, resized, original"),
        ({"fps": 2.5, "time_unit": "second"}, "fps: 2.5 .* a whole number .*time_unit: frame"),
        ({"fps": float("inf"), "time_unit": "second"}, "fps: inf .* a whole number"),
    ],
)
def test_wrong_text_formats_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        TextFormat(**wrong)


def test_step_seconds():
    assert TextFormat(fps=2).step_seconds == 0.5
    assert TextFormat(fps=2, time_unit="second").step_seconds == 1.0


def test_truth_answer_lists_every_step():
    truth = Truth((4, 8), {4: (0.1, 0.2, 0.3, 0.4), 7: (0.5, 0.6, 0.7, 0.8)})
    near, far = (100, 200, 300, 400), (500, 600, 700, 800)
    items = ((4, near), (5, near), (6, far), (7, far), (8, far))
    assert truth_answer(truth, (1000, 1000)) == Answer(4, 8, items, items)
    assert truth_answer(truth, (1000, 1000), think=False) == Answer(4, 8, None, items)


TIMES = [("frame", 1), ("frame", 2.5), ("second", 1), ("second", 3.0)]
FORMATS = [
    TextFormat(coordinates, time_unit, think, fps)
    for coordinates, (time_unit, fps), think in itertools.product(COORDINATES, TIMES, (True, False))
]


@pytest.mark.parametrize("text_format", FORMATS, ids=str)
def test_the_form_in_the_prompt_is_what_the_parser_reads(text_format):
    """Fill the form that the prompt shows with numbers, and nothing else, and parse it."""
    prompt = build_prompt("A dog runs.", 40, (336, 196), text_format)
    form = prompt.split("Answer in this form: ")[1].split("\n")[0]
    filled = re.sub(r"\.\.\.", "6. [9, 8, 7, 6]", form)
    for name, value in {"S": 5, "E": 7, "x1": 1, "y1": 2, "x2": 3, "y2": 4}.items():
        filled = re.sub(rf"\b{name}\b", str(value), filled)
    items = ((5, (1, 2, 3, 4)), (6, (9, 8, 7, 6)), (7, (1, 2, 3, 4)))
    answer = Answer(5, 7, items if text_format.think else None, items)
    assert parse_answer(filled, text_format.think) == answer
    assert format_answer(answer) == filled  # to the last blank: what supervised fine-tuning teaches
    assert parse_answer(filled, not text_format.think) is None


@pytest.mark.parametrize("text_format", FORMATS, ids=str)
def test_the_prompt_says_what_the_numbers_mean(text_format):
    scale = text_format.scale((336, 196), (1280, 720))
    prompt = build_prompt("A dog runs.", 40, scale, text_format)
    assert f"{text_format.fps:g} frames per second" in prompt
    assert f"40 steps of {text_format.step_seconds:g} s, numbered 0 to 39" in prompt
    named = {"norm1000": "from 0 to 1000", "resized": "336 x 196 frames", "original": "1280 x 720 video file"}
    assert [c for c in COORDINATES if named[c] in prompt] == [text_format.coordinates]
    assert ("think_bbox" in prompt) == ("draft" in prompt) == text_format.think
    assert prompt.endswith("\nEvent: A dog runs.")


def test_prompts_of_one_video_differ_in_the_sentence_alone():
    one, two = (build_prompt(sentence, 40, (1000, 1000), TextFormat()) for sentence in ("A.", "B."))
    assert one[:-2] == two[:-2]


@pytest.mark.parametrize(
    ("fps", "unit", "frames", "steps"), [(2, "frame", 7, 7), (2, "second", 7, 4), (4, "second", 8, 2)]
)
def test_steps_that_frames_show(fps, unit, frames, steps):
    assert TextFormat(time_unit=unit, fps=fps).num_steps(frames) == steps
