from __future__ import annotations

import io
import re

import pytest

from lmchat.progress import ProgressBar, clock_time, print_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """The line that a terminal shows."""
        return re.split(r"\r|\x1b\[K", self.getvalue())[-2]


def test_amount_speed_and_time_left() -> None:
    clock = Clock()
    bar = ProgressBar("Reading", 1000, unit="documents", done=200, clock=clock, stream=io.StringIO())
    clock.now += 10
    bar.set(400)  # 200 in 10 s, 600 to go
    assert bar.line(10) == "Reading  ----------  40 %  400 of 1,000 documents  20 documents/s  0m30s left".replace(
        "----------", "####------"
    )
    bar.set(400, eta_seconds=3600)
    assert "1h00m left" in bar.line()


def test_bytes_are_scaled() -> None:
    clock = Clock()
    bar = ProgressBar("Downloading", 2.5e9, unit="B", clock=clock, stream=io.StringIO())
    clock.now += 2
    bar.set(999_600)
    assert "1 MB of 2.5 GB  500 kB/s" in bar.line()


def test_without_a_total_elapsed_time_is_shown() -> None:
    clock = Clock()
    bar = ProgressBar("Computing merges", clock=clock, stream=io.StringIO())
    clock.now += 61
    assert bar.line() == "Computing merges  1m01s"


def test_a_terminal_shows_one_line_and_erases_it() -> None:
    clock, terminal = Clock(), Terminal()
    with ProgressBar("Reading", 4, unit="files", clock=clock, stream=terminal) as bar:
        for _ in bar.track(range(3)):
            clock.now += 1
        assert terminal.screen().startswith("Reading  ━") and "75 %" in terminal.screen()
    assert terminal.screen() == "" and "\n" not in terminal.getvalue()


def test_frequent_updates_are_drawn_once() -> None:
    terminal = Terminal()
    with ProgressBar("Reading", 10_000, clock=Clock(), stream=terminal) as bar:
        for _ in range(10_000):
            bar.advance()
    assert terminal.getvalue().count("Reading") == 1


def test_lines_are_printed_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with ProgressBar("Training", 4, clock=Clock(), stream=terminal):
        print_line("step 1")
        assert "Training" in terminal.screen()
        assert terminal.getvalue().count("Training") == 2
    print_line("done")
    assert capsys.readouterr().out == "step 1\ndone\n"


def test_the_newest_of_several_bars_is_drawn() -> None:
    clock, terminal = Clock(), Terminal()
    with ProgressBar("Training", 4, clock=clock, stream=terminal) as outer:
        with ProgressBar("Rendering", 4, clock=clock, stream=terminal):
            clock.now += 1
            outer.advance()
            assert "Rendering" in terminal.screen()
        clock.now += 1
        outer.advance()
        assert "Training" in terminal.screen()


def test_a_log_gets_one_line_per_minute() -> None:
    clock, log = Clock(), io.StringIO()
    with ProgressBar("Reading", 300, unit="files", clock=clock, stream=log) as bar:
        for _ in range(150):
            clock.now += 1
            bar.advance()
    assert log.getvalue() == (
        "Reading  20 %  60 of 300 files  1 files/s  4m00s left\n"
        "Reading  40 %  120 of 300 files  1 files/s  3m00s left\n"
    )


def test_narrow_terminals_and_disabled_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    with ProgressBar("Reading a great many files of text", 4, unit="files", stream=terminal):
        assert len(terminal.screen()) <= 39
    silent = Terminal()
    with ProgressBar("Reading", 4, enabled=False, stream=silent) as bar:
        bar.advance()
    assert silent.getvalue() == ""


def test_closed_standard_error_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with ProgressBar("Reading", 4) as bar:
        bar.advance()


def test_clock_time() -> None:
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 187, 3900)] == ["0m00s", "1m00s", "3m07s", "1h05m"]
