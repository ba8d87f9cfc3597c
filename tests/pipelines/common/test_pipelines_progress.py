import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.common import progress
from pipelines.common.progress import Progression

ROOT = Path("somewhere")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_duration(seconds, words):
    assert progress.duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_300, "12 kB"), (3.4e6, "3.4 MB"), (5e12, "5.0 TB")],
)
def test_size(number, words):
    assert progress.size(number) == words


def test_text_has_everything():
    text = Progression("fedavg", 50, 200, 25.0, 0.123456, 0.9512).text()
    assert text == "round 50/200  25.0 rounds/s  loss 0.1235  accuracy 95.1 %  6.0 s left"
    assert "0.0 s left" in Progression("fedavg", 200, 200, 0.0, 0.1, 0.5).text()


def drive(reporter, rounds=1000):
    reporter.say("hello [brackets]")
    for method in ("fedavg", "scaffold"):
        for round in range(1, rounds + 1):
            reporter.update(Progression(method, round, rounds, 10.0, 0.5, 0.9))
        reporter.finish()


def test_plain_lines_have_no_control_codes_and_are_few():
    stream = io.StringIO()
    drive(progress.plain(stream, most_lines=20))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "hello [brackets]"
    for method in ("fedavg", "scaffold"):
        ours = [line for line in lines if method in line]
        assert 15 <= len(ours) <= 21
        assert "round 1000/1000" in ours[-1]


def test_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    drive(progress.bar(console), rounds=5)
    text = stream.getvalue()
    assert "hello [brackets]" in text
    assert "\x1b[" in text
    assert "round 5/5" in text
    assert text.count("\x1b[?25h") == 2  # the cursor comes back after each method


def test_silent_says_nothing(capsys):
    drive(progress.silent(), rounds=2)
    assert capsys.readouterr().out == ""


def test_json_lines_are_one_object_each():
    stream = io.StringIO()
    reporter = progress.json_lines(stream)
    drive(reporter, rounds=2)
    reporter.event("evaluated", {"method": "fedavg", "seeds": range(2), "test_loss": [0.5, float("nan")], "path": ROOT})
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert said[0] == {"event": "message", "text": "hello [brackets]"}
    assert said[1:] == [
        {"event": "evaluated", "method": "fedavg", "seeds": [0, 1], "test_loss": [0.5, None], "path": str(ROOT)}
    ]
