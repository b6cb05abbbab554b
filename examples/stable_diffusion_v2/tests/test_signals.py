"""Ctrl-C, SIGTERM and SIGHUP in a process of their own, without MindSpore, whose part the scripts' tests have."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time, logging
from ldm.signals import Signals, Stopped, exit_code
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
signals, way = Signals(), sys.argv[1]
try:
    with signals.listening():
        if way == "at once":
            print("ready", flush=True)
            time.sleep(20)
        if way == "in a destructor":
            class Slow:
                def __del__(self):
                    print("ready", flush=True)
                    time.sleep(3)
            slow = Slow()
            del slow
            time.sleep(20)
        with signals.held("when this step is saved"):
            print("ready", flush=True)
            for _ in range(100):
                time.sleep(0.1)
                if signals.asked and way == "held":
                    print("saved", flush=True)
                    raise Stopped(signals.asked)
except Stopped as stop:
    sys.exit(stop.code)
except KeyboardInterrupt:
    sys.exit(exit_code(signals.asked))
"""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def start(way: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, way], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", CODES)
def test_what_is_held_is_finished(number):
    process = start("held")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (CODES[number], "saved\n")
    assert err.strip() == f"{number.name}: the run ends when this step is saved; a second signal ends it as it is"


@pytest.mark.parametrize("number", CODES)
def test_what_is_not_held_ends_at_once(number):
    process, began = start("at once"), time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == CODES[number] and time.monotonic() - began < 5
    assert err.count("\n") <= 2 and f"{number.name}: the run ends at once" in err


def test_a_second_signal_ends_what_is_held():
    process, began = start("deaf"), time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 143 and time.monotonic() - began < 5


def test_a_signal_while_an_object_is_taken_down_is_not_lost():
    process, began = start("in a destructor"), time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - began < 15
    assert "Traceback" not in err and "SIGTERM: the run ends at once" in err
