"""Whether a parser's time grows with the length of a text, or with its square (which one answer of a model
could use to stop a run)."""

import time

SMALL, LARGE = 6_250, 200_000


def assert_linear(parse, text):
    """parse: str -> anything. text: length -> str of about this length. 32 times the text takes about 32
    times the CPU time, or 1,024 times if it is quadratic. The bound lies 5 times from both, as a crowded
    machine alone makes a measurement 2 to 3 times slower."""
    small, large = (_seconds(parse, text(length)) for length in (SMALL, LARGE))
    assert large < 170 * small + 0.05


def _seconds(parse, text):
    times = []
    for _ in range(3):
        start = time.process_time()
        parse(text)
        times.append(time.process_time() - start)
    return min(times)
