"""The hub, where the ranks of a run meet: small values, barriers, lost ranks, signals. Python alone.

It lives in the launcher (launch.py) or, under a bare mpirun or msrun, in a thread of rank 0. Every rank holds one
TCP connection to it. The kernel closes the connection of a killed process, and keep-alives notice a network that is
gone. So the hub knows which rank was lost; it says so and stops the others.

A message is a line of JSON. The first one is a hello with the run's token: {"token", "rank", "size", "pid", "host"} of
a rank, {"token", "follow"} of a follower, which only waits for the end. The hub answers {"welcome"}, or {"refused"}
with the reason. A process without the token is a stranger: it gets no answer, a few seconds and a few KiB, and what it
sends has no effect. A rank then sends {"at", "give"} to a gathering, {"failed"}, {"interrupted"} by a signal, or
{"done"} with its exit code. A follower sends {"signal"}, which the hub passes on to all ranks. The hub sends {"all"} of
a gathering, {"signal"}, or {"stop"} with an exit code.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ldm.errors import UserError
from ldm.files import escaped, private_folder, replacing
from ldm.signals import ENDING, exit_code

HUB = "LDM_HUB"  # host:port of the launcher's hub
TOKEN, SHORTEST_TOKEN = "LDM_TOKEN", 16  # what the ranks of one run know, and nobody else
PATIENCE, JOIN_SECONDS = "LDM_JOIN_SECONDS", 180  # how long the ranks wait for one another at the start
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8118  # MindSpore's; the hub takes the next port
SILENCE = 30  # seconds after which a network that answers nothing counts as gone
FAREWELL = 10  # seconds in which a stopped rank must have ended
HELLO_SECONDS, HELLO_BYTES = 10, 4096  # the most of a stranger
STRANGERS = 64  # the most connections without a hello, beside one for each rank; then the oldest is dropped
MESSAGE_BYTES = 64 << 20
LONGEST_LINE = 2000  # characters of an error message
HELLO = {"rank": int, "size": int, "pid": int, "host": str}


def scheduler_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of MindSpore's scheduler."""
    return environ.get("MS_SCHED_HOST", DEFAULT_HOST), int(environ.get("MS_SCHED_PORT", DEFAULT_PORT))


def hub_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of the hub: the launcher's, or rank 0's, whose port follows the scheduler's."""
    if HUB in environ:
        host, _, port = environ[HUB].rpartition(":")
        return host, int(port)
    host, port = scheduler_address(environ)
    return host, port + 1


def is_loopback(host: str) -> bool:
    """Whether only this host can reach the address."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host).startswith("127.")
    return False


def new_token(environ: Mapping[str, str] = os.environ) -> str:
    """The user's token, from the environment, or a random one.

    Raises:
        UserError: the user's token is so short that it can be guessed.
    """
    token = environ.get(TOKEN) or secrets.token_hex(16)
    if len(token) < SHORTEST_TOKEN:
        raise UserError(f"{TOKEN} is shorter than {SHORTEST_TOKEN} characters: export {TOKEN}=$(openssl rand -hex 16)")
    return token


def publish_token(token: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the token to a file, for processes of the same user that this one has not started.

    Raises:
        UserError: the user has no private folder.
    """
    try:
        with replacing(_token_file(environ)) as file:
            file.write(token.encode())
    except UserError as error:
        raise UserError(f"{error}; or set {TOKEN} to the same random word for all ranks") from None


def find_token(environ: Mapping[str, str] = os.environ) -> str:
    """The token of the environment or of the file; OSError where there is neither."""
    return environ.get(TOKEN) or _token_file(environ).read_text(errors="replace")


def _token_file(environ: Mapping[str, str]) -> Path:
    host, port = hub_address(environ)
    host = socket.gethostname() if is_loopback(host) else host  # home folders may be shared
    return private_folder("ldm-ranks") / f"{hashlib.sha256(f'{host}:{port}'.encode()).hexdigest()[:16]}.token"


def enter(hello: dict, seconds: float, environ: Mapping[str, str] = os.environ) -> tuple[socket.socket, BinaryIO]:
    """Join the hub; returns the connection, after the hub's welcome, and the lines that come from it.

    Args:
        hello: the first message, without the token.
        seconds: how long to try.
        environ: has the address and the token.

    Raises:
        UserError: the hub cannot be reached, or refuses this process.
    """
    address, deadline, is_closed = hub_address(environ), time.monotonic() + seconds, False
    while True:
        try:
            connection, lines, answer = _say_hello(hello, address, environ)
            break
        except (OSError, ValueError) as error:
            if isinstance(error, ConnectionResetError) and not is_closed:  # the token's file may be an old one
                is_closed, deadline = True, min(deadline, time.monotonic() + SILENCE)
            if time.monotonic() > deadline:
                raise UserError(
                    f"cannot reach rank 0 at {address[0]}:{address[1]} ({escaped(error, 200)}): did it start, does a "
                    f"firewall let this port through, and is {TOKEN} the same on all hosts?"
                ) from None
            time.sleep(0.2)
    if "refused" in answer:
        connection.close()
        raise UserError(f"the run at port {address[1]} of {address[0]} refused this process: {answer['refused']}")
    connection.settimeout(None)
    return connection, lines


def _say_hello(hello: dict, address: tuple[str, int], environ: Mapping[str, str]) -> tuple:
    """(connection, lines, the hub's answer)."""
    message = packed({"token": find_token(environ), **hello})
    connection = socket.create_connection(address, timeout=HELLO_SECONDS)
    try:
        watch_network(connection)
        connection.settimeout(2 * SILENCE)  # the hub may be waiting for a rank that is slow
        connection.sendall(message)
        lines = connection.makefile("rb")
        answer = json.loads(lines.readline(HELLO_BYTES) or "null")
        if not isinstance(answer, dict):
            raise ConnectionResetError("it closed the connection")
        return connection, lines, answer
    except BaseException:
        connection.close()
        raise


class _Stop(Exception):  # noqa: N818 (it may be a signal)
    """All ranks must end now. Holds the line to be printed, if any, and the exit code."""

    def __init__(self, line: str, code: int = 1):
        super().__init__(line)
        self.line, self.code = line, code


@dataclass(eq=False)
class _Peer:
    """The other end of a connection: a stranger, which becomes a rank or a follower by its hello."""

    connection: socket.socket
    since: float
    received: bytearray = field(default_factory=bytearray)
    is_known: bool = False
    rank: int | None = None
    pid: int = 0
    host: str = ""
    given: list = field(default_factory=list)  # [at, value] while it waits
    done: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {escaped(self.host)})"

    def send(self, **message) -> bool:
        """Send a message; returns whether it could be sent."""
        try:
            self.connection.sendall(packed(message))
        except OSError:
            return False
        return True


class Hub:
    """Where the ranks meet.

    Args:
        size: the number of ranks.
        host, port: where it listens; "" is every network of this machine.
        patience: seconds in which all ranks must have come.
        token: every hello must have it.

    Attributes:
        stopped: whether the ranks were told to end and did not end by themselves.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, size: int, host: str, port: int, patience: float, token: str):
        self.size, self.token, self.deadline = size, token, time.monotonic() + patience
        self.patience, self.peers, self.code, self.stopped = patience, [], 0, False
        self.farewell = float("inf")  # until when ranks that know of a signal must end
        self._asked = self._told = 0
        self._cancelled: _Stop | None = None
        self.selector = selectors.DefaultSelector()
        try:
            self.server = socket.create_server((host, port))
        except OSError as error:
            raise UserError(f"port {port} of this host: {error.strerror}; choose another --port") from None
        self.server.setblocking(False)  # a connection may be gone before it is accepted
        self.selector.register(self.server, selectors.EVENT_READ)

    def ask(self, number: int) -> None:
        """Pass a signal on to all ranks, which end by themselves. From any thread."""
        self._asked = self._asked or number

    def cancel(self, line: str, code: int = 1) -> None:
        """End all ranks as they are, and print the line, if any. From any thread."""
        self._cancelled = self._cancelled or _Stop(line, code)

    def serve(self) -> int:
        """Serve until all ranks have ended or have been stopped; prints the reason and returns the exit code."""
        try:
            while sum(peer.done for peer in self.peers) < self.size:
                for key, _ in self.selector.select(0.5):
                    if key.data is None:
                        self._accept()
                    elif key.data in self.peers:  # it may have been dropped in this round
                        self._receive(key.data)
                self._look_after()
        except _Stop as stop:
            self.code, self.stopped = stop.code, True
            if stop.line:  # a progress bar may have left the line open
                print(f"\n{'error: ' if stop.code == 1 else ''}{stop.line}", file=sys.stderr, flush=True)
            for peer in sorted(self._ranks(), key=lambda peer: peer.rank == 0):  # rank 0 may be this process
                peer.send(stop=stop.code)
        return self.code

    def close(self) -> None:
        for connection in (self.server, *(peer.connection for peer in self.peers)):
            connection.close()

    def _ranks(self) -> list[_Peer]:
        return [peer for peer in self.peers if peer.rank is not None]

    def _look_after(self) -> None:
        """Drop silent strangers, obey `ask` and `cancel`, and stop the run if ranks do not come or do not end."""
        now, here = time.monotonic(), {peer.rank for peer in self.peers}
        for peer in [peer for peer in self.peers if not peer.is_known and now - peer.since > HELLO_SECONDS]:
            self._drop(peer)
        if self._cancelled:
            raise self._cancelled
        away = [str(rank) for rank in range(self.size) if rank not in here]
        if self._asked and not self._told:
            self._told, name = self._asked, signal.Signals(self._asked).name
            if away:
                raise _Stop(f"{name}: the run ends before all ranks have come", exit_code(self._asked))
            for peer in self._ranks():
                if not peer.done:
                    peer.send(signal=self._asked)
        if away and now > self.deadline:
            raise _Stop(f"rank {', '.join(away)} did not come within {self.patience:g} s; see its log")
        if now > self.farewell:
            raise _Stop("", self.code)

    def _accept(self) -> None:
        strangers = [peer for peer in self.peers if not peer.is_known]
        if len(strangers) >= STRANGERS + self.size:
            self._drop(strangers[0])
        try:
            connection, _ = self.server.accept()
            watch_network(connection)
        except OSError:
            return
        connection.settimeout(SILENCE)
        self.peers.append(_Peer(connection, time.monotonic()))
        self.selector.register(connection, selectors.EVENT_READ, self.peers[-1])

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16 if peer.is_known else HELLO_BYTES)
        except OSError:
            data = b""
        if not data:
            return self._drop(peer)
        peer.received += data
        if b"\n" in data:
            *lines, peer.received = peer.received.split(b"\n")
            for words in lines:
                if peer in self.peers:
                    self._read(peer, words)
        if len(peer.received) > (MESSAGE_BYTES if peer.is_known else HELLO_BYTES):
            self._drop(peer)
        return None

    def _read(self, peer: _Peer, words: bytearray) -> None:
        try:
            message = json.loads(words)
        except (ValueError, RecursionError):
            message = None
        if not peer.is_known:
            self._meet(peer, message)
        elif peer.rank is None:
            number = message.get("signal") if isinstance(message, dict) else None
            self.ask(number if number in ENDING else 0)
        else:
            self._handle(peer, message if isinstance(message, dict) else {})

    def _meet(self, peer: _Peer, hello: object) -> None:
        """Take in a peer that knows the token."""
        token = hello.get("token") if isinstance(hello, dict) else None
        if not isinstance(token, str) or not hmac.compare_digest(
            token.encode(errors="replace"), self.token.encode(errors="replace")
        ):
            return self._drop(peer)
        if hello.get("follow") is not True:
            if not all(type(hello.get(name)) is kind for name, kind in HELLO.items()):
                return self._drop(peer)
            if hello["size"] != self.size or hello["rank"] not in range(self.size):
                return self._refuse(peer, f"it has {self.size} ranks, not {hello['size']}: choose another port")
            if hello["rank"] in {other.rank for other in self.peers}:
                return self._refuse(peer, f"it has a rank {hello['rank']} already: choose another port")
            peer.rank, peer.pid, peer.host = hello["rank"], hello["pid"], hello["host"]
        peer.is_known = True
        if not peer.send(welcome=True):
            self._drop(peer)
        return None

    def _refuse(self, peer: _Peer, reason: str) -> None:
        peer.send(refused=reason)
        self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self.selector.unregister(peer.connection)
        peer.connection.close()
        if peer.rank is None:
            self.peers.remove(peer)
        elif not peer.done:
            raise _Stop(
                f"{peer} was lost: it was killed, ran out of memory, or its network is gone; "
                "what was saved is intact, --resume True goes on from there"
            )

    def _handle(self, peer: _Peer, message: dict) -> None:
        if isinstance(message.get("failed"), str):
            raise _Stop(escaped(message["failed"], LONGEST_LINE))
        if message.get("interrupted") in ENDING:
            peer.done, self.code = True, exit_code(message["interrupted"])
            self.farewell = min(self.farewell, time.monotonic() + FAREWELL)
            self.ask(message["interrupted"])
        elif type(message.get("done")) is int:
            peer.done, self.code = True, max(self.code, message["done"])
        elif isinstance(message.get("at"), str) and "give" in message:
            peer.given = [message["at"], message["give"]]
            self._answer()
        else:
            raise _Stop(f"{peer} sent what is no message: are all ranks of the same version?")

    def _answer(self) -> None:
        """Once all ranks have given a value, send all values to every rank."""
        ranks = sorted((peer for peer in self.peers if peer.given), key=lambda peer: peer.rank)
        places = {peer.given[0]: peer for peer in ranks}
        if len(places) > 1:
            told = ", ".join(f"{peer} at '{escaped(at)}'" for at, peer in places.items())
            raise _Stop(f"the ranks are not at the same place: {told}")
        if len(ranks) == self.size:
            everything = [peer.given[1] for peer in ranks]
            for peer in ranks:
                peer.given = []
            for peer in ranks:
                if not peer.send(all=everything):
                    self._drop(peer)


def packed(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def watch_network(connection: socket.socket) -> None:
    """Let the kernel notice within `SILENCE` seconds that the other end does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"NODELAY": 1, "KEEPIDLE": SILENCE // 3, "KEEPINTVL": SILENCE // 6, "KEEPCNT": 4}
    for name, value in {**options, "USER_TIMEOUT": SILENCE * 1000}.items():
        if hasattr(socket, f"TCP_{name}"):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
