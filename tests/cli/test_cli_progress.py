"""Progress on stderr: with the time left in a terminal, and a line now and then anywhere else."""

from __future__ import annotations

import io
import time

from rich.console import Console

from prunepass.cli.progress import Bars, _Stretch, duration


def test_without_a_terminal_lines_tell_how_far_it_is() -> None:
    file = io.StringIO()
    with Bars(Console(file=file, width=40), every=0.02) as bars:
        bars.begin("training", 100, done=10)
        bars.step("training: adapt")
        bars.begin("searching", 20)
        bars.step("searching: single cut")
        deadline = time.monotonic() + 10
        while "searching" not in file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        bars.end()
        while "training" not in file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        bars.end()
    lines = file.getvalue().splitlines()
    assert any(line.startswith("searching: single cut: 1 of 20, 0 s so far, about") for line in lines)
    assert any(line.startswith("training: adapt: 11 of 100, ") and line.endswith(" left") for line in lines)


def test_nothing_is_printed_in_less_than_a_minute_or_when_hidden() -> None:
    for options in ({}, {"hidden": True, "every": 0.001}):
        file = io.StringIO()
        with Bars(Console(file=file), **options) as bars:  # type: ignore[arg-type]
            bars.begin("training", 2)
            bars.step("training")
            time.sleep(0.02)
            bars.end()
        assert file.getvalue() == ""


def test_a_terminal_shows_the_time_left() -> None:
    file = io.StringIO()
    with Bars(Console(file=file, force_terminal=True, width=100)) as bars:
        bars.begin("training", 4)
        bars.step("training: rank")
        bars.end()
    assert "left" in file.getvalue()


def test_what_an_earlier_run_did_and_what_lies_within_count_for_no_speed() -> None:
    stretch = _Stretch("training", total=110, done=20, already=10, began=0.0, within=1000.0)
    assert stretch.line(1600.0) == "training: 20 of 110, 27 min so far, about 1 h 30 min left"
    assert _Stretch("training", 10, 0, 0, 0.0).line(61.0) == "training: 0 of 10, 61 s so far"
    assert [duration(s) for s in (40, 720, 11100)] == ["40 s", "12 min", "3 h 05 min"]
