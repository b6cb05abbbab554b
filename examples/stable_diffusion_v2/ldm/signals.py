"""Ctrl-C, SIGTERM and SIGHUP: one line, finished work stays, exit code 130, 143 or 129; a second signal ends at once.

One thread waits for these signals; all other threads block them. Python's own handlers are no use here: they run only
after a graph has ended. And while MindSpore compiles or runs a graph, its own handler turns Ctrl-C into SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAKE = signal.SIGURG  # the waiting thread wakes the main thread with it; nobody else uses it

log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal ends the run, at a place where everything is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = exit_code(number)


def exit_code(number: int) -> int:
    """The exit code that tells a shell that a signal ended a process."""
    return 128 + number


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Foreign threads that are started inside never take these signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Signals:
    """The signals that this process has got.

    Attributes:
        asked: the number of the first signal; 0 where none has come.
        interrupts: whether it interrupts the work at once, so that later errors are its consequences.
    """

    def __init__(self):
        self.asked, self.interrupts, self._until, self._closing = 0, False, "", False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, except in `held`. The block must be in the main thread."""
        numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
        if not numbers:
            yield
            return
        handlers = {number: signal.signal(number, self._handle) for number in (*numbers, WAKE)}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        self.asked, self.interrupts, self._closing = 0, False, False
        waiting = threading.Thread(target=self._wait, args=(numbers,), daemon=True)
        waiting.start()
        hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        try:
            yield
        finally:
            self._closing = True
            sys.unraisablehook = hook
            signal.pthread_kill(waiting.ident, numbers[0])
            waiting.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self, until: str) -> Iterator[None]:
        """Inside, a signal only sets `asked`. The code inside must check it and end the run; `until` says when."""
        self._until = until
        try:
            yield
        finally:
            self._until = ""

    def raise_if_asked(self) -> None:
        """KeyboardInterrupt where a signal has come inside `held`."""
        if self.asked:
            raise KeyboardInterrupt

    def tell(self, number: int) -> None:
        """Send the signal to this process, if none has come yet. From another thread."""
        if not self.asked:
            os.kill(os.getpid(), number)

    def _wait(self, numbers: list[int]) -> None:
        while True:
            number = signal.sigwait(numbers)
            if self._closing:
                return
            if self.asked:
                sys.stderr.flush()
                os._exit(exit_code(self.asked))
            self._note(number)
            self._wake()

    def _wake(self) -> None:
        if not self._closing:
            signal.pthread_kill(threading.main_thread().ident, WAKE)

    def _note(self, number: int) -> None:
        self.asked, self.interrupts = number, not self._until
        until = self._until or "at once, what is finished is kept"
        log.warning("\n%s: the run ends %s; a second signal ends it as it is", signal.Signals(number).name, until)

    def _unraisable(self, lost) -> None:
        """An interrupt that came while Python took an object down is lost there: wake the main thread again."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.1, self._wake)  # in here it would be lost too
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(lost)

    def _handle(self, number: int, _) -> None:
        if not self.asked and number != WAKE:  # a thread took it that does not block it
            self._note(number)
        if self.asked and not self._until:
            raise KeyboardInterrupt


def quiet(kind: type[BaseException], error: BaseException, trace) -> None:
    """An excepthook: Ctrl-C before the work begins needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
