"""The ranks of a run: which of several processes this one is, and how they keep together. Python alone.

Small values and barriers go over the hub (hub.py), without a time limit, so that rank 0 may draw and save for as
long as it takes. Gradients go through MindSpore's own collectives (ldm/train/step.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn

from ldm.errors import UserError
from ldm.parallel.hub import (
    DEFAULT_HOST,
    FAREWELL,
    HUB,
    JOIN_SECONDS,
    PATIENCE,
    TOKEN,
    Hub,
    enter,
    hub_address,
    is_loopback,
    new_token,
    packed,
    publish_token,
)
from ldm.signals import exit_code

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "MS_ROLE", "MS_NODE", "MS_SCHED", "MS_WORKER", "RANK_", HUB, TOKEN)


class Place(NamedTuple):
    """What a launcher says of a process: the launcher's name, the rank, the number of ranks, the rank on its host."""

    launcher: str
    rank: int
    size: int
    local_rank: int


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process, from the variables of mpirun and msrun; None where neither started it.

    Raises:
        UserError: msrun has not said which rank this is.
    """
    if "OMPI_COMM_WORLD_SIZE" in environ:
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
        return Place("mpirun", *(int(environ[name]) for name in names))
    if environ.get("MS_ROLE") == "MS_WORKER":
        if "MS_NODE_ID" not in environ:
            raise UserError("msrun gives no rank to this process: with several hosts it needs --node_rank on each")
        return Place("msrun", *(int(environ[name]) for name in ("MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID")))
    return None


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a process that runs alone."""
    return {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_VARIABLES)}


def follow_hub() -> None:
    """Return when the hub, and so the run, has ended, or when the hub cannot be reached."""
    with contextlib.suppress(UserError, OSError):
        _, lines = enter({"follow": True}, float(os.environ.get(PATIENCE, JOIN_SECONDS)))
        while lines.read(1):
            pass


def follow_parent() -> None:
    """Let Linux end this process when its parent has ended, for whatever reason."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Ranks:
    """This process among those of a run. By default it is alone, and every method returns at once.

    Args:
        rank, size: the number of this process, from 0, and the number of all.
        local_rank: its number on this host, and the number of its device.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.connection: socket.socket | None = None
        self.answers: queue.Queue[list] = queue.Queue()
        self.leaving = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def connect(self, tell: Callable[[int], None]) -> None:
        """Meet the other ranks at the hub.

        Args:
            tell: another thread calls it with the number of a signal that is meant for all ranks.

        Raises:
            UserError: not all came in time.
        """
        seconds, self.tell = float(os.environ.get(PATIENCE, JOIN_SECONDS)), tell
        host, port = hub_address()
        if HUB not in os.environ and self.is_main:
            self._keep_hub(host, port, seconds)
        self.address = f"{host}:{port}"
        hello = {"rank": self.rank, "size": self.size, "pid": os.getpid(), "host": socket.gethostname()}
        self.connection, lines = enter(hello, seconds)
        self.listener = threading.Thread(target=self._listen, args=(lines,), daemon=True)
        self.listener.start()
        self.barrier("start")

    def _keep_hub(self, host: str, port: int, seconds: float) -> None:
        """Start the hub in a thread of rank 0, for a run without our launcher."""
        token = new_token()
        hub = Hub(self.size, DEFAULT_HOST if is_loopback(host) else "", port, seconds, token)
        if not os.environ.get(TOKEN):
            publish_token(token)

        def serve():
            hub.serve()
            if hub.stopped:
                _end(code=hub.code)
            hub.close()

        threading.Thread(target=serve, daemon=True).start()

    def share(self, items: list) -> list:
        """This rank's part of a list; the parts of all ranks, in order, are the list."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def gather(self, at: str, value: Any = None) -> list:
        """The values of all ranks, in order; anything JSON can hold. `at` names the place, the same on all ranks."""
        if self.size == 1:
            return [value]
        self._send(at=at, give=value)
        return self.answers.get()

    def broadcast(self, at: str, value: Any = None) -> Any:
        """Rank 0's value."""
        return self.gather(at, value if self.is_main else None)[0]

    @contextlib.contextmanager
    def main_first(self, at: str) -> Iterator[None]:
        """A block that the other ranks begin after rank 0 has ended it."""
        if not self.is_main:
            self.barrier(at)
        yield
        if self.is_main:
            self.barrier(at)

    def barrier(self, at: str) -> None:
        """Wait until all ranks have come here."""
        self.gather(at)

    def agree(self, at: str, facts: dict) -> None:
        """UserError where a rank has other facts than rank 0: another file, option or set of pictures."""
        own = json.loads(json.dumps(facts))
        first = self.broadcast(at, own)
        different = [
            f"{key} is {own.get(key)!r}, not {first.get(key)!r}" for key in first if own.get(key) != first[key]
        ]
        if different:
            raise UserError(f"rank {self.rank} on {socket.gethostname()} differs from rank 0: {different[0]}")

    def agree_on_lists(self, at: str, lists: dict[str, list]) -> None:
        """`agree` for lists that are too long to be sent, by digests of their items' texts."""
        texts = {key: "\n".join(map(str, items)).encode("utf-8", "surrogatepass") for key, items in lists.items()}
        self.agree(at, {key: hashlib.sha256(text).hexdigest() for key, text in texts.items()})

    def check_shared(self, folder: Path) -> None:
        """UserError where this folder is not the same one for all ranks, as on hosts without a common disk."""
        if self.size == 1:
            return
        probe = folder / self.broadcast("name of a probe", f".shared-{os.getpid()}-{time.time_ns()}")
        if self.is_main:
            probe.touch()
        self.barrier("probe written")
        seen = self.gather("probe seen", probe.exists())
        if self.is_main:
            probe.unlink()
            if not all(seen):
                raise UserError(f"rank {seen.index(False)} does not see {folder} as rank 0 does: use a shared disk")

    def leave(self, code: int = 0) -> None:
        """End the run, regularly or by a signal that all ranks know; returns when all ranks are here."""
        if self.connection is not None:
            self.barrier("end")
            self.leaving = True
            self._send(done=code)
            self.listener.join(FAREWELL)

    def fail(self, line: str) -> NoReturn:
        """End all ranks; the hub prints the line, once."""
        sys.stdout.flush()
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self._send(failed=line)
                self.listener.join(FAREWELL)  # the listener ends this process
        _end(line)

    def interrupted(self, number: int) -> NoReturn:
        """End by a signal; the hub tells the other ranks of it."""
        self.leaving = True
        self._send(interrupted=number)
        self.listener.join(FAREWELL)
        _end(code=exit_code(number))

    def _send(self, **message: Any) -> None:
        try:
            self.connection.sendall(packed(message))
        except OSError:
            self._lost()

    def _listen(self, lines: BinaryIO) -> None:
        with contextlib.suppress(OSError), lines:
            for words in lines:
                message = json.loads(words)
                if "stop" in message:
                    _end(code=message["stop"])
                elif "signal" in message:
                    self.tell(message["signal"])
                else:
                    self.answers.put(message["all"])
        if not self.leaving:
            self._lost()

    def _lost(self) -> NoReturn:
        _end(
            f"rank {self.rank} has lost the launcher or rank 0 ({self.address}): it was killed, or its network is gone"
        )


def _end(line: str = "", code: int = 1) -> NoReturn:
    """End this process at once, from any thread."""
    if line:
        print(f"\nerror: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
