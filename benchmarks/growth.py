# ruff: noqa: E402 (the project is no package: its folder must be on the path first)
"""How the cost of a GRPO step grows: with the video, with the number of answers, with their length.

    python benchmarks/growth.py [--out growth.png] [--dtype bf16] [--no-checkpointing]

Steps of step.py on the small model, one thread, one round each after one to warm up. Of 1512 visual tokens
and 8 answers of 200 tokens one is changed at a time. Prints a Markdown table and draws it. The two lines are
operations by the formula of step.py, both at the speed of the first point: a prompt once for all its answers,
P + G * C, and the padded batch, G * (P + C), where P and C are not tokens but what they cost (a visual token
has a vision tower to pass). Options of step.py may follow, but --against and
--profile. Takes five minutes where nothing else runs.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure

from benchmarks import step
from lab.pictures import save_figure

MIDDLE = {"visual_tokens": 1512, "group": 8, "completion": 200}
VALUES = {
    "visual_tokens": (256, 512, 1024, 2048, 4096, 8192),
    "group": (2, 4, 8, 16, 32),
    "completion": (50, 100, 200, 400, 800),
}
LABELS = {"visual_tokens": "visual tokens", "group": "answers", "completion": "tokens of an answer"}


@functools.cache
def measure(visual_tokens: int, group: int, completion: int, words: tuple[str, ...]) -> dict:
    """The line of step.py. words: more of its options."""
    options = step.parse(["--steps=1", f"--group={group}", f"--completion={completion}", *words])
    (line,) = step.measure(options, visual_tokens)
    print(json.dumps(line), file=sys.stderr)
    return line


def table(sweeps: dict[str, list[dict]]) -> str:
    """In Markdown."""
    rows = [
        "| visual tokens | answers | tokens of each | CPU s | GFLOP needed | MB above the models |",
        "|-" * 6 + "|",
    ]
    for name, lines in sweeps.items():
        for line in lines:
            sizes = [f"**{line[key]}**" if key == name else f"{line[key]}" for key in VALUES]
            figures = f"{line['step_cpu_s']:.2f} | {line['gflop_needed']:.0f} | {line['above_mb']}"
            rows.append(f"| {' | '.join(sizes)} | {figures} |")
    return "\n".join(rows)


def draw(sweeps: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(sweeps)), sweeps.items(), strict=True):
        x, seconds = [line[name] for line in lines], [line["step_cpu_s"] for line in lines]
        speed = lines[0]["gflop_needed"] / seconds[0]
        for law, label, style in (("needed", "P + G·C", "--"), ("padded", "G·(P + C)", ":")):
            scaled = [line[f"gflop_{law}"] / speed for line in lines]
            axes.plot(x, scaled, style, color="gray", label=label)
        axes.plot(x, seconds, "o-", label="measured")
        axes.set(xscale="log", yscale="log", xlabel=LABELS[name], ylabel="CPU seconds of a step")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("growth.png"), help="the picture")
    options, words = parser.parse_known_args()
    if {"--against", "--profile"} & set(words):
        parser.error("neither --against nor --profile")
    sweeps = {
        name: [measure(**{**MIDDLE, name: value}, words=tuple(words)) for value in values]
        for name, values in VALUES.items()
    }
    print(table(sweeps))
    save_figure(draw(sweeps), options.out)


if __name__ == "__main__":
    main()
