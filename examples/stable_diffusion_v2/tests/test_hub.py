"""The hub against strangers, who must be sent away without a trace, and the launcher that keeps it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_ranks import TOKEN, Group, meeting, processes_with

from ldm.errors import UserError
from ldm.parallel import hub as hubs
from ldm.parallel.hub import Hub, enter, find_token, new_token, packed, publish_token

ROOT = Path(__file__).parents[1]
GOOD = {"token": TOKEN, "rank": 1, "size": 2, "pid": 1, "host": "there"}


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


class Meeting:
    """A hub in a thread, and its two ranks, which are sockets."""

    def __init__(self):
        self.hub = Hub(2, "127.0.0.1", 0, 30, TOKEN)
        self.port = self.hub.server.getsockname()[1]
        self.environ = {"LDM_HUB": f"127.0.0.1:{self.port}", "LDM_TOKEN": TOKEN}
        self.codes = []
        self.thread = threading.Thread(target=lambda: self.codes.append(self.hub.serve()))
        self.thread.start()
        self.ranks = [self.enter({**without("token"), "rank": rank}) for rank in range(2)]

    def enter(self, hello: dict):
        return enter(hello, 10, self.environ)

    def stranger(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def send(self, rank: int, /, **message) -> None:
        self.ranks[rank][0].sendall(packed(message))

    def receive(self, rank: int) -> dict:
        return json.loads(self.ranks[rank][1].readline())

    def end(self) -> int:
        """What the run ends with; whatever happened before, the ranks still reach one another."""
        for rank in range(2):
            self.send(rank, at="x", give=rank)
        assert [self.receive(rank) for rank in range(2)] == [{"all": [0, 1]}] * 2
        for rank in range(2):
            self.send(rank, done=0)
        return self.close()

    def close(self) -> int:
        self.thread.join(10)
        self.hub.close()
        return self.codes[0]


@pytest.fixture
def meet(monkeypatch):
    problems = []
    monkeypatch.setattr(threading, "excepthook", problems.append)
    meeting = Meeting()
    yield meeting
    meeting.hub.cancel("the test has failed")
    meeting.close()
    assert not problems


def closed(stranger: socket.socket) -> bytes:
    """What came before the end of the connection."""
    came = b""
    with contextlib.suppress(ConnectionResetError):
        while data := stranger.recv(1 << 16):
            came += data
    return came


WORDS = {
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "a number": b"5\n",
    "an empty line": b"\n",
    "no UTF-8": b"\xff\xfe\x00{\n",
    "brackets": b"[" * 4000 + b"\n",
    "many digits": b'{"rank": ' + b"9" * 4000 + b"}\n",
    "a wrong token": packed({**GOOD, "token": TOKEN[:-1] + "0"}),
    "no token": packed(without("token")),
    "an empty token": packed({**GOOD, "token": ""}),
    "a token that is a number": packed({**GOOD, "token": 5}),
    "a token that is no text": b'{"token": "\\ud800", "rank": 1, "size": 2, "pid": 1, "host": "x"}\n',
    "a follower without the token": packed({"follow": True}),
    "no pid": packed(without("pid")),
    "no host": packed(without("host")),
    "no size": packed(without("size")),
    "no rank": packed(without("rank")),
    "a pid that is a word": packed({**GOOD, "pid": "1"}),
    "a rank that is a truth value": packed({**GOOD, "rank": True}),
    "a rank that is a list": packed({**GOOD, "rank": [1]}),
    "a failure": packed({"failed": "all is lost"}),
    "a leave": packed({"done": 0}),
    "a signal": packed({"signal": 15}),
    "a stop": packed({"stop": 1}),
    "a stranger's second line": packed({"token": "x"}) + packed({"failed": "all is lost"}),
}


@pytest.mark.parametrize("words", WORDS)
def test_what_a_stranger_sends_has_no_effect(meet, capsys, words):
    with meet.stranger() as stranger:
        stranger.sendall(WORDS[words])
        assert closed(stranger) == b""
    assert meet.end() == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({**GOOD, "size": 3}, "it has 2 ranks, not 3"),
        ({**GOOD, "rank": 7}, "it has 2 ranks"),
        (GOOD, "it has a rank 1 already"),
    ],
)
def test_another_run_with_the_token_is_refused_and_told_why(meet, capsys, hello, reason):
    with pytest.raises(UserError, match=f"refused this process: {reason}.*choose another port"):
        meet.enter(hello)
    assert meet.end() == 0
    assert capsys.readouterr().err == ""


def test_endless_bytes_are_cut_off_early(meet, monkeypatch):
    """What can be sent is what the kernel's buffers hold."""
    with meet.stranger() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(10000):
                stranger.sendall(b"x" * 65536)
                assert all(len(peer.received) <= 2 * hubs.HELLO_BYTES for peer in meet.hub.peers)
    assert meet.end() == 0


def test_a_slow_stranger_is_cut_off(meet, monkeypatch):
    monkeypatch.setattr(hubs, "HELLO_SECONDS", 1)
    began = time.monotonic()
    with meet.stranger() as stranger, pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() < began + 8:
            stranger.sendall(b"x")
            time.sleep(0.1)
    assert 0.9 < time.monotonic() - began < 5
    assert meet.end() == 0


def test_many_silent_strangers_keep_nobody_out(meet):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(meet.stranger())
        connection, _ = meet.enter({"follow": True})
        assert len(meet.hub.peers) <= hubs.STRANGERS + 2 + 3
        connection.close()
    assert meet.end() == 0


def test_a_message_of_a_rank_is_bounded(meet, monkeypatch, capsys):
    monkeypatch.setattr(hubs, "MESSAGE_BYTES", 1 << 20)
    with contextlib.suppress(OSError):
        meet.ranks[1][0].sendall(b"x" * (3 << 20))
    assert meet.receive(0) == {"stop": 1} and meet.close() == 1
    assert "rank 1 (process 1 on there) was lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message", [{}, {"at": 5, "give": 0}, {"at": "x"}, {"failed": 5}, {"done": "x"}, {"interrupted": 9}, GOOD]
)
def test_a_rank_of_another_version_ends_the_run_in_one_line(meet, capsys, message):
    meet.send(1, **message)
    assert meet.receive(0) == {"stop": 1} and meet.close() == 1
    assert capsys.readouterr().err.strip() == (
        "error: rank 1 (process 1 on there) sent what is no message: are all ranks of the same version?"
    )


def test_words_of_a_rank_are_fit_to_print(meet, capsys):
    meet.send(1, failed="bad\n\x1b[2J" + "x" * 10000)
    assert meet.receive(0) == {"stop": 1} and meet.close() == 1
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: bad\\n\\x1b[2Jxx") and len(errors) < 2100 and "\n" not in errors


def test_a_signal_is_told_to_all_and_their_code_is_that_of_the_run(meet, capsys):
    connection, _ = meet.enter({"follow": True})  # the launcher of another host
    connection.sendall(packed({"signal": 9}) + packed({"signal": signal.SIGTERM}))
    assert [meet.receive(rank) for rank in range(2)] == [{"signal": 15}] * 2
    for rank in range(2):
        meet.send(rank, done=143)
    assert meet.close() == 143 and capsys.readouterr().err == ""


def test_a_rank_that_a_signal_interrupts_ends_the_others(meet, monkeypatch):
    """The others are told; one that does not react is stopped."""
    monkeypatch.setattr(hubs, "FAREWELL", 1)
    meet.send(1, interrupted=signal.SIGHUP)
    assert [meet.receive(0), meet.receive(0)] == [{"signal": 1}, {"stop": 129}]
    assert meet.close() == 129


def test_the_hub_of_one_host_is_reached_from_there_alone():
    group = meeting("print('ready', flush=True)\ntime.sleep(1)")
    group.ready(0)
    addresses = [socket.gethostbyname(socket.gethostname()), "127.0.0.1"]
    for address in addresses:
        if address != "127.0.0.1":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, group.port + 1), timeout=5)
    assert [code for code, *_ in group.end()] == [0, 0]


# ---- the token ----


def test_the_token_of_ranks_without_our_launcher_is_in_a_file_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environ = {"MS_SCHED_PORT": "9000"}
    with pytest.raises(OSError):
        find_token(environ)
    token = new_token(environ)
    publish_token(token, environ)
    assert find_token(environ) == token and len(token) == 32
    assert find_token({**environ, "LDM_TOKEN": TOKEN}) == TOKEN
    (path,) = tmp_path.rglob("*.token")
    assert path.parent.stat().st_mode & 0o077 == 0
    publish_token(new_token(environ), environ)
    assert find_token(environ) != token
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LDM_TOKEN to the same random word for all ranks"):
        publish_token(token, environ)


def test_a_token_that_can_be_guessed_is_refused():
    with pytest.raises(UserError, match="LDM_TOKEN is shorter than 16 characters"):
        new_token({"LDM_TOKEN": "secret"})
    assert new_token({"LDM_TOKEN": TOKEN}) == TOKEN and new_token({}) != new_token({})


def test_an_old_file_does_not_keep_a_rank_away(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    group = Group("-c", "pass", started=0)
    environ = {"MS_SCHED_PORT": str(group.port)}
    publish_token("old" * 10, environ)
    hub = Hub(2, "127.0.0.1", group.port + 1, 30, TOKEN)
    threading.Thread(target=hub.serve, daemon=True).start()
    threading.Timer(1, publish_token, (TOKEN, environ)).start()
    connection, _ = enter({"follow": True}, 20, environ)
    connection.close()
    hub.cancel("")


def test_a_rank_with_another_token_says_what_to_do(meet, monkeypatch):
    monkeypatch.setattr(hubs, "SILENCE", 6)
    began = time.monotonic()
    with pytest.raises(UserError, match="is LDM_TOKEN the same on all hosts"):
        enter({"follow": True}, 100, {**meet.environ, "LDM_TOKEN": TOKEN[::-1]})
    assert time.monotonic() - began < 20
    assert meet.end() == 0


# ---- the launcher ----

LAUNCH = """
import os, sys
from ldm.parallel.hub import Hub
from ldm.parallel.launch import launch
port, token = int(sys.argv[1]), "0123456789abcdef"
env = {**os.environ, "LDM_HUB": f"127.0.0.1:{port}", "LDM_TOKEN": token}
sys.exit(launch([sys.executable, *sys.argv[2:]], Hub(2, "127.0.0.1", port, 20, token), env))
"""
RANKS = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:], str(rank)]) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
STEPS = """
import os, sys, time
from ldm.parallel.ranks import Ranks
from ldm.signals import Signals
signals, rank = Signals(), int(sys.argv[-1])
with signals.listening():
    ranks = Ranks(rank, 2)
    ranks.connect(signals.tell)
    with signals.held("when this step is made"):
        for step in range(100):
            if asked := max(ranks.gather("signals", signals.asked)):
                os.write(1, f"saved {rank} {step}\\n".encode())
                if "deaf" in sys.argv:
                    time.sleep(100)
                ranks.leave(asked + 128)
                os._exit(asked + 128)
            if step == 3:
                os.write(1, f"process {rank} {os.getpid()}\\n".encode())
            time.sleep(0.1)
"""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def start(*command: str) -> subprocess.Popen:
    """The launcher with a hub for two ranks, and any command."""
    port = Group("-c", "pass", started=0).port
    words = [sys.executable, "-c", LAUNCH, str(port), *command]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_steps(*more: str) -> tuple[subprocess.Popen, dict[int, int]]:
    """The launcher, whose two ranks are at work: {rank: process}."""
    process = start("-c", RANKS, "-c", STEPS, *more)
    lines = [process.stdout.readline().split() for _ in range(2)]
    assert all(line[0] == "process" for line in lines), (lines, process.communicate())
    return process, {int(line[1]): int(line[2]) for line in lines}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("to", ["launcher", "rank 0", "rank 1"])
def test_a_signal_ends_all_ranks_at_the_same_step(number, to):
    process, pids = start_steps()
    os.kill({"launcher": process.pid, "rank 0": pids[0], "rank 1": pids[1]}[to], number)
    out, errors = process.communicate(timeout=90)
    assert process.returncode == CODES[number], errors
    first, second = (line.split() for line in sorted(out.splitlines()))
    assert first[:2] == ["saved", "0"] and second[:2] == ["saved", "1"] and first[2] == second[2]
    assert "error" not in errors and "Traceback" not in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())


def test_a_second_signal_to_the_launcher_ends_it_at_once():
    process, pids = start_steps("deaf")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("saved")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 143 and time.monotonic() - began < 4
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())


def test_a_signal_before_the_ranks_have_come_ends_the_run_in_one_line():
    process = start("-c", "import time; print('ready', flush=True); time.sleep(100)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 143
    assert errors.strip() == "SIGTERM: the run ends before all ranks have come"


def test_only_the_launchers_own_processes_are_killed(tmp_path):
    """Ranks that claim to be another process and then fail, and one that the command has left behind in a session."""
    victim = subprocess.Popen(["sleep", "100"])
    code = f"""
import socket, subprocess, sys, time
from ldm.parallel.hub import enter, packed
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)", "{tmp_path}/x"], start_new_session=True)
hello = {{"size": 2, "pid": {victim.pid}, "host": socket.gethostname()}}
ranks = [enter({{**hello, "rank": rank}}, 10)[0] for rank in range(2)]
ranks[0].sendall(packed({{"failed": "enough"}}))
time.sleep(100)
"""
    process = start("-c", code)
    try:
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 1 and errors.strip() == "error: enough"
        assert victim.poll() is None
        assert not processes_with(f"{tmp_path}/x")
    finally:
        victim.kill()
