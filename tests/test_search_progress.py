"""The progress of a search: figures, and where they are shown."""

import io

import pytest
from search_cases import items, result

from drllm_fast.search import progress
from drllm_fast.search.progress import SearchProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    with SearchProgress(3010, found=1000, stream=stream) as shown:
        for number, item in enumerate(items(10)):
            clock[0] += 4.0
            kept = number % 5 == 0
            shown.advance(result(item, kept=kept, best="1201001" if kept else "1111111", forwards=50))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # after 12, 24, 36 and 40 seconds
    assert lines[0] == "search: 1,003 of 3,010 units, 12.5 paths/s, 33% kept, 2.0 blocks saved, 2:13:48 left"
    assert lines[-1] == "search: 1,010 of 3,010 units, 12.5 paths/s, 20% kept, 2.0 blocks saved, 2:13:20 left"


def test_nothing_is_kept_and_nothing_is_done(clock):
    stream = io.StringIO()
    with SearchProgress(5, found=5, stream=stream) as shown:
        assert shown.summary() == "starting"
    assert stream.getvalue() == ""
    with SearchProgress(1, stream=stream) as shown:
        clock[0] += 1
        shown.advance(result(items(1)[0], kept=False, forwards=0))
    assert "0.0 paths/s, 0% kept, 0 blocks saved, 0:00:00 left" in stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    with SearchProgress(4, found=1, stream=stream) as shown:
        shown.advance(result(items(1)[0], best="01"))
    text = stream.getvalue()
    assert "2/4" in text and "100% kept" in text and "\x1b[" in text
