"""Start a script on several devices: `python -m ldm.parallel.launch SCRIPT [options] -- [options of the script]`.

It checks what can be checked beforehand, starts mpirun or msrun, and keeps the hub where the ranks meet
(ldm/parallel/hub.py). When a rank is lost, it says which one and ends all processes of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ldm.config.options import Parser, read_options
from ldm.errors import UserError
from ldm.parallel.hub import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    FAREWELL,
    HUB,
    JOIN_SECONDS,
    PATIENCE,
    TOKEN,
    Hub,
    enter,
    new_token,
    packed,
    publish_token,
)
from ldm.parallel.ranks import follow_parent, without_launcher
from ldm.signals import ENDING, exit_code

FORWARDED = re.compile(r"PATH|PYTHONPATH|LD_LIBRARY_PATH|GLOG_v|OMP_NUM_THREADS|(MS|LDM|ASCEND|HCCL)_\w+")  # by mpirun
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def build_parser() -> Parser:
    parser = Parser(description="Start a script on several devices.")
    add = parser.add_argument
    add("script", help="the script to start")
    add("--launcher", choices=("mpirun", "msrun"), default="msrun", help="OpenMPI's launcher, or MindSpore's")
    add("--device", choices=("Ascend", "CPU"), help="default: Ascend where there is one, else CPU")
    add("--ranks", type=int, help="processes in all (default: the hosts' devices; 2 on a CPU)")
    add(
        "--hosts", help="a file with a host per line, the first is where you are, each with as many ranks: name slots=N"
    )
    add("--port", type=int, default=DEFAULT_PORT, help="port of MindSpore's scheduler; the next one is used too")
    add("--log_dir", default="output/ranks", help="folder for msrun's files, one per rank")
    return parser


def read_hosts(path: str, ranks: int | None) -> dict[str, int]:
    """{host: ranks} of a host file in OpenMPI's form."""
    try:
        lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the host file {path}: {getattr(error, 'strerror', None) or error}") from None
    hosts = {}
    for line in filter(None, lines):
        slots = [re.fullmatch(r"slots=(\d+)", word) for word in line[1:]]
        if len(slots) != 1 or not slots[0] or not int(slots[0][1]) or line[0] in hosts:
            raise UserError(f"{path}: '{' '.join(line)}' is not of the form: name slots=8, each name once")
        hosts[line[0]] = int(slots[0][1])
    if not hosts:
        raise UserError(f"the host file {path} is empty")
    if ranks and ranks != sum(hosts.values()):
        raise UserError(f"--ranks is {ranks}, the slots of {path} are {sum(hosts.values())}: leave out --ranks")
    return hosts


def visible_devices() -> int:
    """How many NPUs this host shows: those of ASCEND_RT_VISIBLE_DEVICES, or all."""
    chosen = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if chosen:
        return len(chosen.split(","))
    return sum(bool(re.fullmatch(r"davinci\d+", path.name)) for path in Path("/dev").glob("davinci*"))


def this_host(hosts: dict[str, int]) -> int:
    """The place of this host in the list, by its names and addresses."""
    for place, host in enumerate(hosts):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind((socket.gethostbyname(host), 0))  # only an address of this machine can be bound to
                return place
        except OSError:
            continue
    raise UserError(f"none of the hosts {', '.join(hosts)} is this one, {socket.gethostname()}")


def check_script(name: str, words: list[str]) -> None:
    """Check the script's own options, and that its data can be read: one line here instead of one per rank."""
    if not Path(name).is_file() or Path(name).is_absolute():
        raise UserError(f"there is no {name} here: name a script by its path from {Path.cwd()}")
    script = importlib.import_module(".".join(Path(name).with_suffix("").parts))
    args = read_options(script.build_parser(), words)
    for option in ("data_path", "real_dir", "gen_dir", "image_path"):
        path = getattr(args, option, None)
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{option} {path} does not exist or cannot be read")


def command(args: argparse.Namespace, hosts: dict[str, int], here: int, env: dict[str, str]) -> list[str]:
    """The command that starts the ranks of all hosts (mpirun) or of this one (msrun)."""
    size, master = sum(hosts.values()), next(iter(hosts))
    if args.launcher == "msrun":
        words = ["msrun", "--worker_num", size, "--local_worker_num", [*hosts.values()][here], "--node_rank", here]
        words += ["--master_addr", master, "--master_port", args.port, "--log_dir", args.log_dir, "--join", True]
        words += ["--cluster_time_out", 1800, "--tail_worker_log", 0]  # the hub is less patient
        return list(map(str, words))
    words = ["mpirun", "-n", size, "--bind-to", "none"]  # pinned to one core each, MindSpore's start hangs on a CPU
    words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    words += ["--hostfile", args.hosts] if args.hosts else ["--oversubscribe"]
    words += [word for name in sorted(env) if FORWARDED.fullmatch(name) for word in ("-x", name)]
    return [*map(str, words), sys.executable]


def launch(words: list[str], hub: Hub | None, env: dict[str, str]) -> int:
    """Run the command to its end, and the hub beside it; returns the exit code.

    A signal is passed on to all ranks, which end by themselves; a second one ends them at once.
    """
    _adopt_orphans()
    child = subprocess.Popen(words, env=env, start_new_session=True, preexec_fn=follow_parent)
    verdict, asked = [], _passed_on(hub, env)
    if hub:
        serving = threading.Thread(target=lambda: verdict.append(hub.serve()), daemon=True)
        serving.start()
    while child.poll() is None and not verdict and (hub or len(asked) < 2):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
    if hub:
        serving.join(1)  # after a good end, both end at about the same time
        hub.cancel(f"{words[0]} ended before its ranks did, with exit code {child.returncode}")
        serving.join(FAREWELL)
        verdict = verdict or [1]
    if any(verdict) or len(asked) > 1:
        child.terminate()  # before the ranks end, or msrun would print how they ended
    if hub:
        hub.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(FAREWELL)
    child.kill()
    _end_descendants(child)
    codes = verdict if hub else [exit_code(number) for number in asked[:1]]
    return next(filter(None, [*codes, abs(child.wait())]), 0)


def _passed_on(hub: Hub | None, env: dict[str, str]) -> list[int]:
    """The signals that come from now on, in a list that grows. They are passed on to the hub; a second one makes the
    hub end the run if it is in this process, otherwise `launch` does."""
    asked = []

    def handle(number, _):
        asked.append(number)
        if hub is None:
            threading.Thread(target=_ask_hub, args=(number, env), daemon=True).start()
        elif len(asked) == 1:
            hub.ask(number)
        else:
            hub.cancel("", exit_code(asked[0]))

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handle)
    return asked


def _ask_hub(number: int, env: dict[str, str]) -> None:
    """Pass a signal on from another host to the hub on the first host, which tells all ranks."""
    with contextlib.suppress(UserError, OSError):
        connection, _ = enter({"follow": True}, FAREWELL, env)
        connection.sendall(packed({"signal": number}))


def _adopt_orphans() -> None:
    """Let Linux make this process the parent of processes that its children leave behind."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> set[int]:
    """The ids of the processes that this one has started, directly or through others."""
    parents, found = {}, {os.getpid()}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _end_descendants(child: subprocess.Popen) -> None:
    """End the run's last processes a second after its command. No number from the network is ever used for it."""
    patience, deadline = time.monotonic() + 1, time.monotonic() + FAREWELL
    while (left := descendants()) and time.monotonic() < deadline:
        child.poll()
        for pid in left - {child.pid}:
            with contextlib.suppress(OSError):
                if time.monotonic() > patience:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)  # an adopted process; nobody else reaps it
        time.sleep(0.05)


def settle(args: argparse.Namespace) -> tuple[dict[str, int], int, dict[str, str]]:
    """({host: ranks}, the place of this host among them, the environment of the ranks).

    Raises:
        UserError: a mistake that can be known beforehand.
    """
    args.device = args.device or ("Ascend" if visible_devices() else "CPU")
    ranks = (visible_devices() or 2) if args.ranks is None else args.ranks
    hosts = read_hosts(args.hosts, args.ranks) if args.hosts else {DEFAULT_HOST: ranks}
    here = this_host(hosts)
    own, master = [*hosts.values()][here], next(iter(hosts))
    if not 0 < args.port < 65535 or own < 1:
        raise UserError(f"--port {args.port}, {own} ranks: ports go from 1 to 65534, ranks begin at 1")
    if args.device == "Ascend" and visible_devices() < own:
        raise UserError(f"{own} ranks are to run on this host, which shows {visible_devices()} NPUs")
    if args.launcher == "mpirun" and here:
        raise UserError(f"mpirun starts all hosts of {args.hosts} from the first, {master}")
    if args.launcher == "msrun" and len(set(hosts.values())) > 1:
        raise UserError(f"msrun wants as many slots on every host of {args.hosts}: use --launcher mpirun")
    try:
        address = socket.gethostbyname(master)
    except OSError as error:
        raise UserError(f"{args.hosts}: the first host, {master}, is not known here: {error.strerror}") from None
    if len(hosts) > 1 and address.startswith("127."):
        raise UserError(
            f"{master} is {address} here, where no other host can reach it: give its address in {args.hosts}"
        )
    env = environment(args)
    env.update(MS_SCHED_HOST=address, MS_SCHED_PORT=str(args.port))
    env[HUB] = f"{DEFAULT_HOST if len(hosts) == 1 else address}:{args.port + 1}"
    if args.device == "CPU":
        env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // own)))
    return hosts, here, env


def environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment of the launcher and its ranks.

    Raises:
        UserError: the launcher is not there, or msrun would start another Python than this one.
    """
    env = without_launcher()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # msrun starts "python"
    if not shutil.which(args.launcher, path=env["PATH"]):
        advice = {"mpirun": "install OpenMPI or use --launcher msrun", "msrun": "install MindSpore, which brings it"}
        raise UserError(f"{args.launcher} is not on the PATH: {advice[args.launcher]}")
    python = shutil.which("python", path=env["PATH"])
    if args.launcher == "msrun" and not (python and os.path.samefile(python, sys.executable)):
        raise UserError(
            f"msrun starts 'python', which is {python} and not {sys.executable}: put that first on the PATH"
        )
    if os.environ.get(TOKEN):
        env[TOKEN] = new_token()
    env.pop("RANK_TABLE_FILE", None)  # deprecated since MindSpore 2.4; a forgotten one overrules the launcher
    return env


def keep_hub(args: argparse.Namespace, hosts: dict[str, int], env: dict[str, str]) -> Hub:
    """The hub of the run. Its token goes into the environment of the ranks, and into a file for msrun's other hosts.

    Raises:
        UserError: one of the two ports is taken.
    """
    listen, seconds = DEFAULT_HOST if len(hosts) == 1 else "", float(env.get(PATIENCE, JOIN_SECONDS))
    given, token = TOKEN in env, new_token(env)
    Hub(0, listen, args.port, seconds, token).close()  # raises if the scheduler's port is taken
    hub = Hub(sum(hosts.values()), listen, args.port + 1, seconds, token)
    if args.launcher == "msrun" and len(hosts) > 1 and not given:
        publish_token(token, env)
    env[TOKEN] = token
    return hub


def main() -> None:
    words, script = sys.argv[1:], []
    if "--" in words:
        at = words.index("--")
        words, script = words[:at], words[at + 1 :]
    args = build_parser().parse_args(words)
    hosts, here, env = settle(args)
    check_script(args.script, script)
    hub = keep_hub(args, hosts, env) if here == 0 else None
    words = [*command(args, hosts, here, env), args.script, *script]
    sys.exit(launch([*words, "--use_parallel", "True", "--device_target", args.device], hub, env))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
