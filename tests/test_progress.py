from __future__ import annotations

import io
import re
import threading
from contextlib import redirect_stderr

import pytest

from lmchat import progress
from lmchat.progress import ProgressBar, clock_time, print_line
from terminal import Terminal


def test_amount_speed_and_time_left() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Reading", 1000, unit="documents", done=200) as bar:
        bar.start_t -= 10
        bar.set(400)  # 200 in 10 s, 600 to go
        bar.refresh()
        numbers = r" 400/1000 \[00:1\d<00:[23]\d, +\d+\.\d+ documents/s\]"
        assert re.fullmatch(rf"Reading:  40%\|[^|]+\|{numbers}", terminal.screen())


def test_bytes_are_scaled() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Downloading", 2.5e9, unit="B") as bar:
        bar.set(999_600)
        bar.refresh()
        assert "1.00M/2.50G" in terminal.screen() and "B/s" in terminal.screen()


def test_without_a_unit_the_share_is_shown() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Reading text", 1.0) as bar:
        bar.set(0.25, "Computing merges")
        assert terminal.screen().startswith("Computing merges:  25%|") and "0.25" not in terminal.screen()


def test_a_terminal_shows_one_line_and_erases_it() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Reading", 4, unit="files") as bar:
        for _ in bar.track(range(3)):
            pass
        bar.refresh()
        assert terminal.screen().startswith("Reading:  75%|")
    assert terminal.getvalue().split("\r")[-2].strip() == "" and "\n" not in terminal.getvalue()


def test_frequent_updates_are_drawn_once() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Reading", 10_000) as bar:
        bar.mininterval = 1000.0
        for _ in range(10_000):
            bar.update()
    assert terminal.getvalue().count("Reading") == 1


def test_a_new_description_is_drawn_at_once() -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("ARC", 4, unit="tasks") as bar:
        bar.set(1, "MMLU")
        assert terminal.screen().startswith("MMLU:  25%|")


def test_lines_are_printed_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Training", 4):
        print_line("step 1")
        assert "Training" in terminal.screen()
        assert terminal.getvalue().count("Training") == 2
    print_line("done")
    assert capsys.readouterr().out == "step 1\ndone\n"


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with redirect_stderr(io.StringIO()) as log, ProgressBar("Reading", 4, unit="files") as bar:
        for _ in bar.track(range(4)):
            pass
    shares = [re.match(r"Reading: +(\d+)%", line)[1] for line in log.getvalue().splitlines()]  # type: ignore[index]
    assert shares == ["0", "25", "50", "75", "100"] and "\r" not in log.getvalue()


def test_a_log_gets_no_line_within_the_first_minute() -> None:
    with redirect_stderr(io.StringIO()) as log, ProgressBar("Reading", 4, unit="files") as bar:
        for _ in bar.track(range(4)):
            bar.set(bar.n, "Still reading")
    assert log.getvalue() == ""


def test_disabled_bars_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stderr(Terminal()) as terminal, ProgressBar("Reading", 4, enabled=False) as bar:
        bar.set(2, "Reading on")
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with redirect_stderr(io.StringIO()) as log, ProgressBar("Training", 4, log=False) as bar:
        bar.update()
    assert log.getvalue() == ""


def test_closed_standard_error_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with ProgressBar("Reading", 4) as bar:
        bar.update()


def test_no_thread_is_started() -> None:
    before = threading.active_count()
    with redirect_stderr(Terminal()), ProgressBar("Reading", 4):
        assert threading.active_count() == before


def test_clock_time() -> None:
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 187, 3900)] == ["0m00s", "1m00s", "3m07s", "1h05m"]
