"""Damage thousands of small files of every kind that is read here, and check how their readers answer.

    python tools/fuzz_files.py --cases 100000 --seed 0 [--first 0] [--kind png]

A reader may succeed, or raise a UserError of one short line. Anything else is a failure, also more than 2 s of
processor time or 500 MB of memory. The number of a failed case is printed: --seed S --first N --cases 1 runs it again.
The exit code is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import runtime  # noqa: F401
from ldm.errors import UserError
from tools.fuzz_damage import damage
from tools.fuzz_samples import Sample, make_samples

SECONDS, MEGABYTES, LONGEST = 2, 500, 600  # processor time; memory; characters of a message
WAIT = 60  # seconds of wall time; a reader that takes longer counts as hanging


class Slow(BaseException):
    """A reader takes too long. It is no Exception, so that no reader catches it by mistake."""


def fault(read: Callable[[], object]) -> str | None:
    """What is wrong with a reader's outcome; None where nothing is."""
    began, outcome = time.process_time(), None
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        read()
    except UserError as error:
        line = str(error)
        if not line.isprintable() or len(line) > LONGEST or isinstance(error.__context__, MemoryError):
            outcome = f"{len(line)} characters: {line[:300]!r}"
    except (Exception, SystemExit, Slow) as error:
        outcome = "".join(traceback.format_exception(error)[-3:])[-900:]
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    slow = time.process_time() - began > SECONDS
    return outcome or ("slow" if slow else None)


def stop(*_) -> None:
    raise Slow


def run(samples: dict[str, Sample], seed: int, numbers: range) -> tuple[Counter, Counter]:
    """(cases tried, cases failed) by kind; prints the failed cases."""
    tried, failed = Counter(), Counter()
    for number in numbers:
        rng = random.Random(f"{seed}:{number}")
        kind = rng.choice(list(samples))
        path = rng.choice(samples[kind].damaged)
        whole = path.read_bytes()
        what, data = damage(rng, path.name, whole)
        path.write_bytes(data)
        wrong = fault(samples[kind].read)
        path.write_bytes(whole)
        tried[kind] += 1
        if wrong:
            failed[kind] += 1
            print(f"case {number}, {kind}, {path.name}, {what}: {wrong}", flush=True)
    return tried, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="two runs of one seed are the same (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--kind", help="this kind alone (default: all); other numbers of cases then")
    args = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    for end in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(end, stop)
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder))
        samples = {args.kind: samples[args.kind]} if args.kind else samples
        wrong = {kind: found for kind, sample in samples.items() if (found := fault(sample.read))}
        there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + (MEGABYTES << 20), resource.RLIM_INFINITY))
        tried, failed = run(samples, args.seed, range(args.first, args.first + args.cases))
    for kind in sorted(tried):
        print(f"{kind:14} {tried[kind]:8} cases {failed[kind]:6} failed")
    sys.exit(bool(wrong or failed))


if __name__ == "__main__":
    main()
