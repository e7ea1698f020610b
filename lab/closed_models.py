"""Ask closed chat models (the paper's Fig. 8), and score their CSV answers.

    python -m lab.closed_models questions configs/closed_model.yaml > questions.jsonl
    python -m lab.closed_models convert answers.jsonl configs/closed_model.yaml > converted.jsonl
    python evaluate.py --predictions converted.jsonl --data configs/closed_model.yaml

A question is one JSON object: the "id" of the sentence, the "video", where the clip "begin"s and "end"s in it
(seconds), and the "prompt". An answer is a line with that "id" and the model's text as "completion".

Chat models talk, and write tables. Lines that are neither an interval nor a row are passed over, and so are
brackets, quotes and bars around numbers, and everything before "</think>". The interval is the first one of
the last line with one above the first row; "End: 7" may stand below "Start: 5". Dates, "a video of 0 - 20 s"
and "coordinates from 0 to 1" are none. (How the authors read these answers is not in the paper.)
"""

import json
import re
import sys
from pathlib import Path

from config import Config, ConfigError, load_config
from evaluate import load_split
from prompts import Answer, format_answer
from runtime.files import run_script
from runtime.predictions import read_predictions
from samples import Box

# How a chat model writes times, which `plain` makes numbers of seconds: 1 min 5 s, 1m05; 0:05, 00:00:05.2
MINUTES = re.compile(
    r"(?i)(?<![0-9.:])([0-9]{1,3}) ?m(?:in(?:ute)?s?\b\.?|in(?=[0-9])|(?= ?[0-9]))"
    r"(?: ?(?:and )?([0-9]{1,2})(?:\.[0-9]{1,20})?(?![0-9:]))?"
)
CLOCK = re.compile(r"(?<![0-9:.])((?:[0-9]{1,2}:){1,2}[0-9]{2})(?:\.[0-9]{1,20})?(?![0-9:])")
AFTER = r"(?:(?:st|nd|rd|th)\b(?: seconds?\b)?| ?(?:s|secs?|seconds?)\b\.?)(?: mark\b)?"  # 5th second, 5 sec.
BEFORE = r"\b(?:(?:at|the|about|around|approximately|seconds?|secs?|t ?=) ?){1,3}"  # at about second 5, t=5
UNIT = re.compile(rf"(?i)(?<=[0-9]){AFTER}|{BEFORE}(?=[0-9])")
DATE = r"(?<![0-9.])(?:[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}|(?:19|20)[0-9]{2}-[0-9]{2})(?![0-9])"
SECONDS = r"(?<![0-9:.])([0-9]{1,5})(?:\.[0-9]{1,20})?(?![0-9:]| ?%)"  # and no share, such as 80 - 90%
OTHER = re.compile(  # a video of 0 - 20; coordinates from 0 to 1
    r"(?i)(?:(?:video|clip|film|footage|recording) (?:of|runs|lasts|spans)(?: from)?"
    rf"|(?:coordinates?|normali[sz]ed|y2)[^0-9]{{0,20}}) ?[\[(]?0(?:\.0)? ?(?:-|,|to|and) ?{SECONDS}"
)
INTERVAL = re.compile(  # start 5, end 7; between 5 and 7; 5 - 7; [5, 7]
    rf"(?i)(?:start|begin|from)[^0-9]{{1,20}}{SECONDS}[^0-9]{{1,30}}(?:end|stop)[^0-9]{{1,20}}{SECONDS}"
    rf"|between\s{{1,9}}{SECONDS}\s{{0,9}}and\s{{0,9}}{SECONDS}"
    rf"|{SECONDS},?\s{{0,9}}(?:-{{1,3}}>?|(?:up )?to|until|till|through)\s{{0,9}}{SECONDS}"
    rf"|[\[(]{SECONDS}\s{{0,9}},\s{{0,9}}{SECONDS}\s{{0,9}}[\])]"
)
END = re.compile(r"(?i)\W{0,20}(?:end|stop)")  # a line that goes with the one above it, "Start: 5"
NUMBER = re.compile(r"-?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")
SIGNS = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "\xa0\u202f"), " ")
SIGNS |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212~\u2192\u301c\uff0d\uff5e"), "-")
SIGNS |= dict.fromkeys(map(ord, "\"'`*\u2022"))
BRACKETS = str.maketrans("", "", "[](){}")


def build_csv_prompt(sentence: str) -> str:
    """What the paper's Fig. 8 asks of closed models, in our words: whole seconds from 0, an interval, then
    CSV in relative coordinates, at most 30 boxes."""
    return (
        "Find when the event below happens in the video, and where its subject is. First write the interval"
        " as START - END, in whole seconds from the beginning of the video, which is second 0. Then write CSV"
        " with the header timestamp, x1, y1, x2, y2 and a line for each second of the interval, at most 30 of"
        " them: the second, and the box around the subject, its top left and its bottom right corner, each"
        " coordinate as a decimal from 0 to 1 of the frame's width or height. Write nothing else.\n"
        f"Event: {sentence}"
    )


def parse_csv_answer(text: str) -> Answer | None:
    """A chat model's answer: an interval in seconds, then rows `timestamp, x1, y1, x2, y2`; None if either is
    missing. Its boxes are the relative decimals of the text, not clamped.

    Timestamps are cut to whole seconds; of two boxes in one second the first counts. Never raises, and takes
    time linear in the text.
    """
    interval, boxes, above = None, {}, ""
    for line in text.rpartition("</think>")[2].translate(SIGNS).splitlines():
        if row := parse_row(line):
            boxes.setdefault(*row)
        elif not boxes and line.strip():
            line = plain(line)
            if found := INTERVAL.search(f"{above} {line}" if END.match(line) else line):
                interval = [int(number) for number in found.groups() if number]
            above = line
    return Answer(*interval, None, tuple(boxes.items())) if interval and boxes else None


def parse_row(line: str) -> tuple[int, Box] | None:
    """(second, box) of a line with five columns of numbers, None for any other line."""
    line = line.translate(BRACKETS).strip().removeprefix("- ").strip(" ,;|\t")
    clock, *cells = [cell.strip() for cell in re.split(r"[,;|\t]", line)]
    if len(cells) != 4 or not all(map(NUMBER.fullmatch, cells)):
        return None
    timestamp = re.fullmatch(SECONDS, plain(clock))
    return timestamp and (int(timestamp[1]), tuple(map(float, cells)))


def plain(line: str) -> str:
    """The line with its times as numbers of seconds (at most 99999, what an answer can say), and without
    dates, the length of the video and the range of the coordinates."""
    line = MINUTES.sub(lambda found: str(60 * int(found[1]) + int(found[2] or 0)), re.sub(DATE, "", line))
    return OTHER.sub("", UNIT.sub("", CLOCK.sub(lambda found: seconds(found[1]), line)))


def seconds(clock: str) -> str:
    """0:05 or 00:00:05 -> 5."""
    return str(min(sum(int(part) * 60**k for k, part in enumerate(reversed(clock.split(":")))), 99999))


def convert(text: str) -> tuple[str, bool]:
    """A chat model's answer in our own grammar, or as it is if it cannot be read; and whether one of its
    coordinates lies outside [0, 1] and was clamped. Boxes become integers from 0 to 1000, rounded."""
    answer = parse_csv_answer(text)
    if answer is None:
        return text, False
    outside = any(not 0 <= value <= 1 for _, box in answer.pred for value in box)
    pred = tuple((step, tuple(round(1000 * min(max(v, 0), 1)) for v in box)) for step, box in answer.pred)
    return format_answer(Answer(answer.start, answer.end, None, pred)), outside


def print_questions(config: Config) -> None:
    """One JSON object for each held-out sentence."""
    samples, _ = load_split(config, config.eval_annotations)
    for sample in samples[: config.eval_limit or None]:
        begin, end = sample.begin_frame, sample.begin_frame + sample.num_frames
        clip = {"begin": round(begin / sample.fps, 3), "end": round(end / sample.fps, 3)}  # seconds
        question = {"id": sample.id, "video": sample.video} | clip
        print(json.dumps(question | {"prompt": build_csv_prompt(sample.sentence)}, ensure_ascii=False))


def print_converted(answers: Path) -> None:
    """The lines of a file of answers, each completion converted; what stands out, to stderr."""
    unread = clamped = 0
    for record in read_predictions(answers):
        text, outside = convert(record["completion"])
        unread, clamped = unread + (text == record["completion"]), clamped + outside
        print(json.dumps(record | {"completion": text}))
    if unread:
        print(f"{unread} answers cannot be read: they stay, and count as failures", file=sys.stderr)
    if clamped:
        print(f"{clamped} answers have coordinates outside 0 to 1, which were clamped", file=sys.stderr)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["questions", config, *settings]:
            print_questions(load_config(config, settings))
        case ["convert", answers, config, *settings]:
            chosen = load_config(config, settings)
            if (chosen.time_unit, chosen.think, chosen.coordinates) != ("second", False, "norm1000"):
                raise ConfigError(f"{config}: set time_unit: second, think: false, coordinates: norm1000")
            print_converted(Path(answers))
        case _:
            sys.exit(__doc__.strip())


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
