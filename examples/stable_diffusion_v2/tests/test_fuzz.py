"""Damaged files of every kind that is read, by the hundred; tools/fuzz_files.py does it by the thousand."""

import signal
import subprocess
import sys
import time

import pytest

sys.path.insert(0, "tools")
from ldm.errors import UserError
from tools import fuzz_files


def test_no_damage_leads_to_anything_but_a_line():
    words = [sys.executable, "tools/fuzz_files.py", "--cases", "300", "--seed", "7"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(counts) == 25 and sum(counts) == 300


def refuse(line):
    raise UserError(line)


def crash(*_):
    return {}["x"]


def work():
    while True:
        pass


def grow():
    try:
        raise MemoryError
    except MemoryError:
        raise UserError("cannot be read") from None


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (lambda: 1, None),
        (lambda: refuse("one line"), None),
        (lambda: refuse("two\nlines"), "characters"),
        (lambda: refuse("\x1b[31m"), "characters"),
        (lambda: refuse("x" * 5000), "5000 characters"),
        (crash, "KeyError"),
        (lambda: sys.exit(2), "SystemExit"),
        (grow, "characters"),
        (lambda: time.sleep(9), "Slow"),
        (work, "Slow"),
    ],
)
def test_what_counts_as_a_failure(monkeypatch, read, wrong):
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.3)
    monkeypatch.setattr(fuzz_files, "WAIT", 2)
    before = {end: signal.signal(end, fuzz_files.stop) for end in (signal.SIGPROF, signal.SIGALRM)}
    try:
        found = fuzz_files.fault(read)
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
    assert found is None if wrong is None else wrong in found


def test_a_failed_case_is_told_and_found_again_by_its_number(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    samples = {"x": fuzz_files.Sample([path], lambda: crash() if path.read_text(errors="replace")[:1] != "{" else None)}
    tried, failed = fuzz_files.run(samples, 3, range(60))
    told = capsys.readouterr().out
    assert tried["x"] == 60 and 0 < failed["x"] == told.count("KeyError: 'x'") and path.read_text() == '{"a": 1}'
    number = int(told.split(",")[0].removeprefix("case "))
    assert fuzz_files.run(samples, 3, range(number, number + 1))[1]["x"] == 1
    assert capsys.readouterr().out in told
