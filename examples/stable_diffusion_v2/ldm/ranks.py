"""The ranks of a run: which of several processes this one is, and how they keep together.

Every rank holds one TCP connection to a hub, which lives in the launcher (ldm/launch.py) or, under a bare mpirun or
msrun, in a thread of rank 0. Small values and barriers go over it, without a time limit, so that rank 0 may draw and
save for as long as it takes. The kernel closes the connection of a process that is killed, and its keep-alives notice a
network that is gone: the hub then knows which rank was lost, says so, and stops the others. Gradients go through
MindSpore's own collectives (ldm/train/step.py).

A message is a line of JSON. From a rank: {"rank", "size", "pid", "host"} once, {"at", "give"} to a gathering,
{"failed"}, {"done"}. From the hub: {"all"} of a gathering, {"stop"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ldm.errors import UserError

HUB = "LDM_HUB"  # host:port of the launcher's hub
PATIENCE, JOIN_SECONDS = "LDM_JOIN_SECONDS", 180  # how long the ranks wait for one another at the start
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8118  # MindSpore's; the hub takes the next port
SILENCE = 30  # seconds after which a network that answers nothing counts as gone
FAREWELL = 10  # seconds in which a stopped rank must have ended
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "MS_ROLE", "MS_NODE", "MS_SCHED", "MS_WORKER", "RANK_", "LDM_HUB")


class Place(NamedTuple):
    """What a launcher says of one process: its name, the rank, how many there are, which of its host's it is."""

    launcher: str
    rank: int
    size: int
    local_rank: int


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process by the variables that mpirun and msrun set; None where neither started it.

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
    """The environment for a process that is to run alone."""
    return {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_VARIABLES)}


def scheduler_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of MindSpore's scheduler."""
    return environ.get("MS_SCHED_HOST", DEFAULT_HOST), int(environ.get("MS_SCHED_PORT", DEFAULT_PORT))


def hub_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of the hub: the launcher's, or rank 0's, behind the scheduler."""
    if HUB in environ:
        host, _, port = environ[HUB].rpartition(":")
        return host, int(port)
    host, port = scheduler_address(environ)
    return host, port + 1


def follow_hub() -> None:
    """Come back when the hub has ended, and with it the run; also where it cannot be reached."""
    deadline = time.monotonic() + float(os.environ.get(PATIENCE, JOIN_SECONDS))
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(hub_address(), timeout=10) as connection:
            connection.settimeout(None)
            while connection.recv(1 << 10):
                pass
            return
        time.sleep(0.2)


def follow_parent() -> None:
    """Let Linux end this process when the one that started it has ended, however that happened."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Ranks:
    """This process among those of a run. Alone, which is the default, every method answers at once.

    Args:
        rank, size: which one of how many.
        local_rank: which one of this host's, hence which device.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.connection: socket.socket | None = None
        self.answers: queue.Queue[list] = queue.Queue()
        self.leaving = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def connect(self) -> None:
        """Meet the others.

        Raises:
            UserError: not all came in time.
        """
        seconds = float(os.environ.get(PATIENCE, JOIN_SECONDS))
        host, port = hub_address()
        if HUB not in os.environ and self.is_main:
            serve_in_thread(Hub(self.size, "", port, seconds))
        self.hub = f"{host}:{port}"
        deadline = time.monotonic() + seconds
        while self.connection is None:
            try:
                self.connection = socket.create_connection((host, port), timeout=10)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"rank {self.rank} cannot reach rank 0 at {self.hub} ({error}): did it start, "
                        "and does a firewall let this port through?"
                    ) from None
                time.sleep(0.2)
        _watch_network(self.connection)
        self.connection.settimeout(None)
        self._send(rank=self.rank, size=self.size, pid=os.getpid(), host=socket.gethostname())
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        self.barrier("start")

    def share(self, items: list) -> list:
        """This rank's part of a list; the parts of all ranks, in order, are the list."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def gather(self, at: str, value: Any = None) -> list:
        """The values of all ranks, by rank: whatever JSON can hold. `at` names the place, the same on all ranks."""
        if self.size == 1:
            return [value]
        self._send(at=at, give=value)
        return self.answers.get()

    def broadcast(self, at: str, value: Any = None) -> Any:
        """Rank 0's value."""
        return self.gather(at, value if self.is_main else None)[0]

    @contextlib.contextmanager
    def main_first(self, at: str) -> Iterator[None]:
        """A block that rank 0 has ended before the others begin it."""
        if not self.is_main:
            self.barrier(at)
        yield
        if self.is_main:
            self.barrier(at)

    def barrier(self, at: str) -> None:
        """Go on when all ranks have come here."""
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
        """The same for lists that are too long to be sent: by a digest of their items' texts."""
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

    def leave(self) -> None:
        """The end of a run that went well; comes back when all ranks are here."""
        if self.connection is not None:
            self.barrier("end")
            self.leaving = True
            self._send(done=True)
            self.listener.join(FAREWELL)

    def fail(self, line: str) -> NoReturn:
        """End all ranks; the hub prints the line, once."""
        sys.stdout.flush()
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self._send(failed=line)
                self.listener.join(FAREWELL)  # it ends this process
        _end(line)

    def _send(self, **message: Any) -> None:
        try:
            self.connection.sendall(_line(message))
        except OSError:
            self._lost()

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self.connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "stop" in message:
                    _end()
                self.answers.put(message["all"])
        if not self.leaving:
            self._lost()

    def _lost(self) -> NoReturn:
        _end(f"rank {self.rank} has lost the launcher or rank 0 ({self.hub}): it was killed, or its network is gone")


@dataclass
class _Peer:
    """A rank as the hub sees it."""

    connection: socket.socket
    received: bytes = b""
    hello: dict = field(default_factory=dict)
    given: list = field(default_factory=list)  # [at, value] while it waits
    done: bool = False

    def __str__(self) -> str:
        return f"rank {self.hello['rank']} (process {self.hello['pid']} on {self.hello['host']})"


class Hub:
    """Where the ranks meet.

    Args:
        size: how many ranks are to come.
        host, port: where it listens; "" is every network of this machine.
        patience: seconds in which all must have come.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, size: int, host: str, port: int, patience: float):
        self.size, self.patience, self.peers = size, patience, []
        self.cancelled = ""  # set by another thread: why everything is to stop
        self.selector = selectors.DefaultSelector()
        try:
            self.server = socket.create_server((host, port))
        except OSError as error:
            raise UserError(f"port {port} of this host: {error.strerror}; choose another --port") from None
        self.selector.register(self.server, selectors.EVENT_READ)

    def serve(self) -> bool:
        """Until all ranks have taken leave; False where one failed or was lost: then this has been printed."""
        deadline = time.monotonic() + self.patience
        try:
            while sum(peer.done for peer in self.peers) < self.size:
                for key, _ in self.selector.select(0.5):
                    self._accept() if key.data is None else self._receive(key.data)
                if self.cancelled:
                    raise UserError(self.cancelled)
                here = {peer.hello.get("rank") for peer in self.peers}
                away = [str(rank) for rank in range(self.size) if rank not in here]
                if away and time.monotonic() > deadline:
                    raise UserError(f"rank {', '.join(away)} did not come within {self.patience:g} s; see its log")
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)  # a progress bar may have left the line open
            for peer in sorted(self.peers, key=lambda peer: peer.hello.get("rank") == 0):  # whose process may be this
                with contextlib.suppress(OSError):
                    peer.connection.sendall(_line({"stop": True}))
            return False
        finally:
            self.close()
        return True

    def close(self) -> None:
        for connection in (self.server, *(peer.connection for peer in self.peers)):
            connection.close()

    def kill_local(self) -> None:
        """End the ranks of this host that have not ended by themselves."""
        deadline = time.monotonic() + FAREWELL / 2
        local = [peer.hello["pid"] for peer in self.peers if peer.hello.get("host") == socket.gethostname()]
        while local and time.monotonic() < deadline:
            local = [pid for pid in local if os.path.exists(f"/proc/{pid}")]
            time.sleep(0.1)
        for pid in local:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _accept(self) -> None:
        connection, _ = self.server.accept()
        _watch_network(connection)
        connection.settimeout(SILENCE)
        self.peers.append(_Peer(connection))
        self.selector.register(connection, selectors.EVENT_READ, self.peers[-1])

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return self._drop(peer)
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = {}
            if peer.hello or (isinstance(message, dict) and {"rank", "size"} <= message.keys()):
                self._handle(peer, message)
            else:  # a stranger, such as a scan of ports
                return self._drop(peer)
        return None

    def _drop(self, peer: _Peer) -> None:
        self.selector.unregister(peer.connection)
        peer.connection.close()
        if peer.hello and not peer.done:
            raise UserError(
                f"{peer} was lost: it was killed, ran out of memory, or its network is gone; "
                "what was saved is intact, --resume True goes on from there"
            )

    def _handle(self, peer: _Peer, message: dict) -> None:
        if "rank" in message:
            taken = [other.hello.get("rank") for other in self.peers]
            if message["size"] != self.size or message["rank"] in taken:
                raise UserError(
                    f"rank {message['rank']} of {message['size']} came, of another run: choose another port"
                )
            peer.hello = message
        elif "failed" in message:
            raise UserError(message["failed"])
        elif "done" in message:
            peer.done = True
        else:
            peer.given = [message["at"], message["give"]]
            self._answer()

    def _answer(self) -> None:
        """Where all have given, all get all."""
        ranks = sorted((peer for peer in self.peers if peer.given), key=lambda peer: peer.hello["rank"])
        places = {peer.given[0]: peer for peer in ranks}
        if len(places) > 1:
            told = ", ".join(f"{peer} at '{at}'" for at, peer in places.items())
            raise UserError(f"the ranks are not at the same place: {told}")
        if len(ranks) == self.size:
            answer = _line({"all": [peer.given[1] for peer in ranks]})
            for peer in ranks:
                peer.given = []
            for peer in ranks:
                try:
                    peer.connection.sendall(answer)
                except OSError:
                    self._drop(peer)


def serve_in_thread(hub: Hub) -> None:
    """For a run without our launcher: rank 0 keeps the hub, and prints what it says."""

    def serve():
        if not hub.serve():
            _end()

    threading.Thread(target=serve, daemon=True).start()


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _watch_network(connection: socket.socket) -> None:
    """Let the kernel find out within `SILENCE` seconds that the other end does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"NODELAY": 1, "KEEPIDLE": SILENCE // 3, "KEEPINTVL": SILENCE // 6, "KEEPCNT": 4}
    for name, value in {**options, "USER_TIMEOUT": SILENCE * 1000}.items():
        if hasattr(socket, f"TCP_{name}"):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def _end(line: str = "") -> NoReturn:
    """End this process from any thread, whatever the others do."""
    if line:
        print(f"\nerror: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
