"""Several real processes: they meet, share, fail together, and give what one process gives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_train_parts as train_parts
import text_to_image
import train_distillation
import train_text_to_image
from steps_on_ranks import STEPS
from test_scripts import QUICKLY, SMALLER, call, fill_place, refusal, run, sampling, tensors, training

from ldm import checkpoint
from ldm.errors import UserError
from ldm.parallel.hub import Hub
from ldm.parallel.launch import build_parser, command, main, read_hosts, this_host
from ldm.parallel.ranks import Ranks, place, without_launcher
from ldm.train.cache import ENTRY_BYTES

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef"
STATE = Path("ckpt/rank_0/train_resume.safetensors")
MEET = """
import sys, time
from ldm.errors import UserError
from ldm.parallel.ranks import Ranks, place
here = place()
ranks = Ranks(here.rank, here.size, here.local_rank)
try:
    ranks.connect(lambda number: print(number, flush=True))
    exec(sys.argv[1])
    ranks.leave()
except UserError as error:
    ranks.fail(str(error))
"""


def free_port() -> int:
    """The first of two that follow one another and are free now."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            try:
                other.bind(("", one.getsockname()[1] + 1))
                return one.getsockname()[1]
            except OSError:
                continue


class Group:
    """Processes with the variables that mpirun sets, each of which runs the command."""

    def __init__(self, *command: object, size: int = 2, started: int | None = None, **environ: str):
        self.port = free_port()
        self.processes = []
        for rank in range(size if started is None else started):
            told = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank}
            env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in told.items()}
            env.update(MS_SCHED_PORT=str(self.port), PYTHONPATH=str(ROOT), **environ)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env={**os.environ, **env},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ready(self, rank: int) -> None:
        assert self.processes[rank].stdout.readline().strip() == "ready"

    def end(self, seconds: float = 40) -> list[tuple[int, str, str]]:
        """(exit code, output, errors) of each."""
        try:
            outputs = [process.communicate(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs)]


def meeting(code: str, **more) -> Group:
    """Ranks that meet, run the code and take leave."""
    return Group("-c", MEET, code, **more)


def test_ranks_share_values_and_wait_for_one_another(tmp_path):
    code = f"""
assert ranks.gather("a", ranks.rank * 1.1) == [0.0, 1.1, 2.2]
assert ranks.broadcast("b", ["first", ranks.rank]) == ["first", 0]
assert str(ranks.broadcast("c", float("nan"))) == "nan"
ranks.agree("d", dict(x=(1, 2)))
for i in range(300):
    assert ranks.gather(f"e{{i}}", i) == [i] * 3
from pathlib import Path
folder = Path({str(tmp_path)!r})
with ranks.main_first("f"):
    if ranks.is_main:
        time.sleep(0.5)
        folder.joinpath("there").touch()
    assert folder.joinpath("there").exists()
ranks.check_shared(folder)
"""
    for exit_code, _, errors in meeting(code, size=3).end():
        assert exit_code == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_alone_nothing_is_waited_for(tmp_path):
    alone = Ranks()
    assert alone.gather("x", 5) == [5] and alone.broadcast("x", 6) == 6 and alone.is_main
    alone.barrier("x"), alone.agree("x", {}), alone.check_shared(tmp_path), alone.leave()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(victim):
    """The others wait for something else than the victim's next message: one computes, one is in a barrier."""
    code = "print('ready', flush=True)\nranks.barrier('x') if ranks.rank == 2 else time.sleep(100)"
    group = meeting(code, size=3)
    for rank in range(3):
        group.ready(rank)
    os.kill(group.processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    ends = group.end()
    assert time.monotonic() - began < 10
    assert [code for code, *_ in ends] == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    if victim:
        assert f"rank 1 (process {group.processes[1].pid} on {socket.gethostname()}) was lost" in ends[0][2]
        assert "--resume True" in ends[0][2] and not ends[2][2]  # one line, from one
    else:
        assert all("has lost the launcher or rank 0" in errors for _, _, errors in ends[1:])


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("if ranks.rank == 1: raise UserError('no such picture')\nranks.barrier('x')", "error: no such picture"),
        ("ranks.barrier(f'place {ranks.rank}')", "not at the same place: rank 0 (process"),
        ("ranks.agree('x', dict(seed=ranks.rank))", "differs from rank 0: seed is 1, not 0"),
        ("sys.exit() if ranks.rank else ranks.barrier('x')", "was lost"),
    ],
)
def test_what_ends_a_run_is_said_once(code, line):
    ends = meeting(code).end()
    assert ends[0][0] == 1 and line in ends[0][2] and ends[0][2].count("error:") == 1
    assert not ends[1][2]


def test_a_stranger_is_sent_away():
    group = meeting("print('ready', flush=True)\ntime.sleep(1)")
    group.ready(0)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"5\n", b""):
        with socket.create_connection(("127.0.0.1", group.port + 1)) as stranger:
            stranger.sendall(words)
            assert words == b"" or stranger.recv(100) == b""
    assert [code for code, *_ in group.end()] == [0, 0]


def test_a_rank_that_does_not_come_is_named():
    ((code, _, errors),) = meeting("", started=1, LDM_JOIN_SECONDS="1").end()
    assert code == 1 and "rank 1 did not come within 1 s" in errors


def test_a_port_that_is_taken():
    hub = Hub(2, "", free_port(), 10, TOKEN)
    with pytest.raises(UserError, match="choose another --port"):
        Hub(2, "", hub.server.getsockname()[1], 10, TOKEN)
    hub.close()


def test_places_by_the_launchers_variables():
    assert place({}) is None and place({"MS_ROLE": "MS_SCHED"}) is None
    mpirun = {"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert tuple(place(mpirun)) == ("mpirun", 9, 16, 1)
    msrun = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "16", "DEVICE_ID": "1"}
    with pytest.raises(UserError, match="--node_rank"):
        place(msrun)
    assert tuple(place({**msrun, "MS_NODE_ID": "9"})) == ("msrun", 9, 16, 1)
    assert without_launcher({**mpirun, **msrun, "HOME": "/"}) == {"DEVICE_ID": "1", "HOME": "/"}


@pytest.mark.skipif(sys.platform != "linux", reason="MindSpore's collectives on a CPU need Linux")
def test_steps_of_two_ranks_are_those_of_one(tmp_path):
    """20 steps, each of 2 ranks, 2 micro-batches and 2 samples, beside one with all 8: weights, average, optimizer."""
    for exit_code, _, errors in Group(ROOT / "tests/steps_on_ranks.py", tmp_path).end(250):
        assert exit_code == 0, errors[-3000:]
    first, second = (tensors(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    alone = train_parts.make()
    train_parts.train(alone, 0, STEPS)
    straight = {name: param.asnumpy() for name, param in alone.variables().items()}
    assert {name.split(".")[0] for name in straight} > {"ema", "adam_m", "adam_v"}
    for name in straight:
        assert relative_difference({name: straight[name]}, {name: first[name]}) < 1e-6, name


def relative_difference(one: dict, other: dict) -> float:
    """2-norm of the difference over the 2-norm, of all tensors together."""
    assert one.keys() == other.keys()
    difference = sum(float(np.sum((one[name].astype(np.float64) - other[name]) ** 2)) for name in one)
    return (difference / sum(float(np.sum(one[name].astype(np.float64) ** 2)) for name in one)) ** 0.5


def weights(state: Path, least: int = 101) -> dict:
    """Of a resume state, but for those whose gradient is zero: a bias before a norm of that one channel.

    Their gradients are rounding errors, by which Adam moves them as far as by anything else.
    """
    found = tensors(state)
    moved = [name for name, square in found.items() if name.startswith("adam_v.") and square.max() > 1e-16]
    assert len(moved) >= least
    return {name: found[name] for name in (name[len("adam_v.") :] for name in moved)}


# ---- the launcher ----


def launch(script: str, *words: object, path: str | None = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, **({"PATH": path} if path else {})}
    command = [str(ROOT / "scripts" / script), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_host_files(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode1 slots=8\n\nnode2 slots=4 # small\n")
    assert read_hosts(str(path), None) == {"node1": 8, "node2": 4}
    with pytest.raises(UserError, match="--ranks is 16, the slots .* are 12"):
        read_hosts(str(path), 16)
    for text in ("node1\n", "node1 slots=x\n", "node1 slots=8\nnode1 slots=8\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="slots=8|empty"):
            read_hosts(str(path), None)
    assert this_host({"192.0.2.1": 8, "127.0.0.1": 8}) == 1
    with pytest.raises(UserError, match="none of the hosts"):
        this_host({"192.0.2.1": 8})


def test_commands_for_one_host_and_for_many():
    hosts = {"node1": 8, "node2": 4}
    words = ["train_text_to_image.py", "--hosts", "file", "--port", "9000"]
    msrun = " ".join(command(build_parser().parse_args(words), hosts, 1, {}))
    for part in ("--worker_num 12", "--local_worker_num 4", "--node_rank 1", "--master_addr node1 --master_port 9000"):
        assert part in msrun
    args = build_parser().parse_args([*words, "--launcher", "mpirun"])
    mpirun = " ".join(command(args, hosts, 0, {"MS_SCHED_HOST": "node1", "HOME": "/", "HCCL_X": "1"}))
    for part in ("-n 12", "--bind-to none", "--hostfile file", "-x HCCL_X -x MS_SCHED_HOST"):
        assert part in mpirun
    assert "HOME" not in mpirun


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ranks", 0], "ranks begin at 1"),
        (["--device", "Ascend", "--ranks", 8], "8 ranks are to run on this host, which shows 0 NPUs"),
        (["--hosts", "nowhere"], "cannot read the host file nowhere"),
        (["--launcher", "mpirun"], "mpirun is not on the PATH: install OpenMPI or use --launcher msrun"),
        (["--launcher", "slurm"], "invalid choice: 'slurm'"),
        (["--", "--data_path", "nowhere"], "data_path nowhere does not exist"),
        (["--", "--n_samplse", "1"], "unknown option --n_samplse; the nearest known option is --n_samples"),
        (["--port", "{taken}"], "choose another --port"),
    ],
)
def test_launches_that_cannot_work(monkeypatch, capsys, words, line):
    monkeypatch.setenv("PATH", "/nowhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = [str(word).replace("{taken}", str(server.getsockname()[1])) for word in words]
        monkeypatch.setattr(sys, "argv", ["launch.py", "text_to_image.py", *words])
        with pytest.raises((UserError, SystemExit)) as caught:
            main()
    assert line in str(caught.value) + capsys.readouterr().err


def test_scripts_and_hosts_that_cannot_be_launched(monkeypatch, tmp_path):
    def complaint(*words):
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, words)])
        with pytest.raises(UserError) as caught:
            main()
        return str(caught.value)

    monkeypatch.chdir(ROOT)
    for script in ("nowhere.py", ROOT / "text_to_image.py"):
        assert f"there is no {script} here" in complaint(script)
    hosts = tmp_path / "hosts"
    words = ["text_to_image.py", "--hosts", hosts]
    hosts.write_text("127.0.0.1 slots=2\n192.0.2.1 slots=1\n")
    assert "msrun wants as many slots on every host" in complaint(*words)
    hosts.write_text("127.0.0.1 slots=2\n192.0.2.1 slots=2\n")
    assert "127.0.0.1 is 127.0.0.1 here, where no other host can reach it" in complaint(*words)
    hosts.write_text("nowhere.invalid slots=2\n127.0.0.1 slots=2\n")
    assert "nowhere.invalid, is not known here" in complaint(*words)


def test_msrun_would_start_another_python(monkeypatch, tmp_path):
    """It starts whatever is called python, and this one is called otherwise."""
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "msrun").symlink_to(tmp_path / "python")
    (tmp_path / "python3.99").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.99"))
    monkeypatch.setattr(sys, "argv", ["launch.py", "text_to_image.py"])
    with pytest.raises(UserError, match="msrun starts 'python', which is .*: put that first on the PATH"):
        main()


# ---- the scripts on two ranks ----

with_mpirun = pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not installed: apt install openmpi-bin")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """What `test_scripts.place` has, with the smallest UNet, and prompts."""
    folder = tmp_path_factory.mktemp("ranks")
    fill_place(folder, SMALLER)
    (folder / "prompts.txt").write_text("a cat\na dog\nan apple\n")
    return folder


def steps(small: Path, output: Path, count: int, *more) -> list[str]:
    """Options of a run that saves every 10 steps and whose learning rate does not depend on their number."""
    more = ["--step_mode", True, "--ckpt_save_interval", 10, "--decay_steps", 20, "--train_steps", count, *more]
    return training(small, output, *more)


def launcher(name: str, *more) -> list[str]:
    return ["--launcher", name, "--device", "CPU", "--ranks", "2", "--port", str(free_port()), *map(str, more), "--"]


def distributed(script: str, words: list[str], folder: Path) -> subprocess.Popen:
    environ = {**os.environ, "PYTHON": sys.executable}
    log = open(folder / "console.log", "w")  # noqa: SIM115 (the processes' own)
    return subprocess.Popen([str(ROOT / "scripts" / script), *words], cwd=folder, env=environ, stdout=log, stderr=log)


def processes_with(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found


def ranks_of(pids: list[int]) -> dict[int, int]:
    """{rank: process}, by the environment that a launcher gives."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            values = dict(item.split("=", 1) for item in environ if "=" in item)
            if values.get("MS_ROLE") == "MS_WORKER" or "OMPI_COMM_WORLD_RANK" in values:
                found[int(values.get("OMPI_COMM_WORLD_RANK", values.get("MS_NODE_ID")))] = pid
    return found


def step_of(output: Path) -> int:
    """The step that a run has saved last."""
    return json.loads(checkpoint.formats.read(output / STATE)[1]["train_state"])["progress"]["step"]


def copy_of_state(process: subprocess.Popen, output: Path, step: int) -> Path:
    """A copy of the run's folder, as soon as it has saved that step."""
    state, deadline = output / STATE, time.monotonic() + 250
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists() and step_of(output) == step:
            being_written = shutil.ignore_patterns("*.partial", "*.png")
            return shutil.copytree(output, output.with_name(f"{output.name} at {step}"), ignore=being_written)
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not seen: {(output.parent / 'console.log').read_text()[-3000:]}")


def losses(folder: Path) -> list[float]:
    return [float(line.split("\t")[2]) for line in (folder / "result.log").read_text().splitlines()[1:]]


def kill_when(seen, rank: int, started: subprocess.Popen, output: Path) -> None:
    """kill -9 of a rank as soon as `seen()`; its launcher must then end, name it, and leave no process behind."""
    deadline = time.monotonic() + 250
    while not seen():
        waits = time.monotonic() < deadline and started.poll() is None
        assert waits, (output.parent / "console.log").read_text()[-3000:]
        time.sleep(0.001)
    pids = processes_with(str(output))
    os.kill(ranks_of(pids)[rank], signal.SIGKILL)
    assert started.wait(60) != 0
    console = (output.parent / "console.log").read_text()
    assert re.search(rf"^error: rank {rank} \(process \d+ on .*\) was lost", console, re.MULTILINE), console[-3000:]
    time.sleep(2)
    assert not set(pids) & set(processes_with(str(output)))


def alone(words: list[str], script=train_text_to_image) -> None:
    """The training of one process: of this one."""
    with pytest.MonkeyPatch.context() as patch:
        call(patch, script, words)


@pytest.mark.parametrize("name", ["msrun", pytest.param("mpirun", marks=with_mpirun)])
def test_steps_of_two_ranks_end_well_and_are_measured(small, name):
    """MindSpore's scheduler once took ranks that had ended for lost, and msrun failed after good trainings."""
    words = ["--config", small / "model.yaml", "--batch", "2", "--size", "8", "--steps", "1", "--ranks", "2"]
    words += ["--launcher", name, "--port", str(free_port())]
    done = run("tools/benchmark_ranks.py", *words)
    found = re.search(r"2 rank\(s\), [\d.]+ M weights, .*: ([\d.]+) s\n  rank 0: (.*); loss of the last", done.stdout)
    parts = [float(seconds) for seconds in re.findall(r"([\d.]+) s \(", found[2])]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(float(found[1]), abs=0.003)


@pytest.mark.parametrize(("name", "victim"), [("msrun", 0), pytest.param("mpirun", 1, marks=with_mpirun)])
def test_two_ranks_equal_one_with_twice_the_batch_and_a_lost_one_costs_nothing(small, tmp_path, name, victim):
    """20 steps of one process with 6 pictures against two with 3. A rank is killed while rank 0 saves a later step. The
    state before is intact, is the one that a single process reaches from step 20, and the run goes on from there."""
    alone(steps(small, tmp_path / "one", 20, "--train_batch_size", 6))
    output = tmp_path / "two"
    words = [*launcher(name, "--log_dir", tmp_path / "logs"), *steps(small, output, 1000)]
    started = distributed("run_train_distributed.sh", words, tmp_path)
    at_20 = copy_of_state(started, output, 20)
    folder, being_written = (output / STATE).parent, f"{STATE.name}.*.partial"
    kill_when(lambda: any(folder.glob(being_written)) and step_of(output) > 20, victim, started, output)
    assert not list(output.glob("**/rank_1"))  # rank 0 alone writes

    assert (
        relative_difference(weights(tmp_path / "one" / STATE), weights(at_20 / STATE)) < 1e-5
    )  # 3.6e-6 where measured
    np.testing.assert_allclose(*(losses(folder)[:20] for folder in (tmp_path / "one", at_20)), rtol=1e-5)
    step, more = step_of(output), ["--train_batch_size", 6, "--resume", True]
    assert step > 20 and step % 10 == 0
    alone(steps(small, at_20, step, *more))
    assert relative_difference(weights(output / STATE), weights(at_20 / STATE)) < 1e-5
    alone(steps(small, output, step + 2, *more))
    assert (output / "result.log").read_text().splitlines()[-1].startswith(f"{step + 2}\t")


def test_a_distillation_on_two_ranks_is_that_on_one(small, tmp_path):
    """Across the end of a halving, guided, with a moving average: students of 2 and 1 steps."""
    words = ["--start_steps", 4, "--updates_per_halving", 2, "--scale", 3, "--ckpt_save_interval", 10, *QUICKLY]
    alone(training(small, tmp_path / "one", *words, "--train_batch_size", 6), train_distillation)
    options = [*launcher("msrun", "--log_dir", tmp_path / "logs"), *training(small, tmp_path / "two", *words)]
    started = distributed("run_distillation_distributed.sh", options, tmp_path)
    assert started.wait(300) == 0, (tmp_path / "console.log").read_text()[-3000:]
    assert not list((tmp_path / "two").glob("**/rank_1"))
    both = tmp_path / "one", tmp_path / "two"
    assert relative_difference(*(weights(folder / STATE, least=4) for folder in both)) < 4e-6
    for student in ("student-2.safetensors", "student-1.safetensors"):
        assert relative_difference(*(tensors(folder / "ckpt/rank_0" / student) for folder in both)) < 4e-5
    np.testing.assert_allclose(*map(losses, both), rtol=1e-5)


def test_a_rank_killed_in_the_first_pass_of_the_data(small, tmp_path):
    """Its share of the cache is begun; what is there is taken over, and the run is that of one process."""
    more = [*QUICKLY, "--data_path", ROOT / "datasets/emoji/openmoji/test", "--cache_path"]
    one, two = (steps(small, tmp_path / name, 20, *more, tmp_path / name / "cache") for name in ("one", "two"))
    started = distributed("run_train_distributed.sh", launcher("msrun", "--log_dir", tmp_path / "logs") + two, tmp_path)
    rows = tmp_path / "two/cache"
    kill_when(lambda: any(path.stat().st_size for path in rows.glob("latents-*/keys.crc32")), 1, started, rows.parent)
    assert not (tmp_path / "two/result.log").exists()
    kept = sum(path.stat().st_size // ENTRY_BYTES for path in rows.glob("latents-*/keys.crc32"))
    assert 0 < kept < 121
    for words in (one, two):
        alone(words)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)


def test_a_signal_to_the_launcher_or_to_a_rank_is_a_place_to_go_on_from(small, tmp_path):
    """Two parts of a run, each ended by a signal, and the rest by one process are the run in one part."""
    alone(steps(small, tmp_path / "one", 60, "--train_batch_size", 6, *QUICKLY))
    output, done = tmp_path / "two", 0
    more = ["--resume", True, "--ckpt_save_interval", 1000]  # the signal saves, not the interval
    words = [*launcher("msrun", "--log_dir", tmp_path / "logs"), *steps(small, output, 60, *QUICKLY)]
    for number, rank in ((signal.SIGTERM, None), (signal.SIGHUP, 1)):
        started, log = distributed("run_train_distributed.sh", words, tmp_path), output / "result.log"
        deadline = time.monotonic() + 250
        while not log.exists() or len(log.read_text().splitlines()) < done + 4:
            waits = time.monotonic() < deadline and started.poll() is None
            assert waits, (tmp_path / "console.log").read_text()[-3000:]
            time.sleep(0.01)
        pids = processes_with(str(output))
        os.kill(started.pid if rank is None else ranks_of(pids)[rank], number)
        assert started.wait(60) == 128 + number
        console = (tmp_path / "console.log").read_text()
        assert console.count("SIGTERM: the run ends when this step is made and saved") == (rank is None), console
        assert re.search(r"stopped after step \d+ of 60; --resume True goes on from there$", console, re.MULTILINE)
        assert "error" not in console and "Traceback" not in console
        assert not set(pids) & set(processes_with(str(output)))
        done = len(log.read_text().splitlines()) - 1
        assert 3 <= done < 60 and step_of(output) == done
        words = [*launcher("msrun", "--log_dir", tmp_path / "logs"), *steps(small, output, 60, *QUICKLY, *more)]
    alone(steps(small, output, 60, "--train_batch_size", 6, *QUICKLY, *more))
    assert relative_difference(*(weights(folder / STATE, least=4) for folder in (tmp_path / "one", output))) < 2e-6
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(output), rtol=1e-5)


@pytest.mark.parametrize("name", ["msrun", pytest.param("mpirun", marks=with_mpirun)])
def test_pictures_of_two_ranks_are_those_of_one(small, tmp_path, monkeypatch, name):
    words = sampling(small, tmp_path / "one", "--data_path", small / "prompts.txt", "--n_iter", 1, "--n_samples", 2)
    call(monkeypatch, text_to_image, words)
    words[words.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    words = [*launcher(name, "--log_dir", tmp_path / "logs"), *words]
    assert distributed("run_infer_distributed.sh", words, tmp_path).wait(250) == 0, (
        tmp_path / "console.log"
    ).read_text()
    one, two = (
        {path.relative_to(tmp_path / side): path.read_bytes() for path in (tmp_path / side).rglob("*.png")}
        for side in ("one", "two")
    )
    assert len(one) == 7 and one == two  # six, and the grid


def test_use_parallel_and_launcher_go_together(small, tmp_path, monkeypatch, capsys):
    words = sampling(small, tmp_path, "--use_parallel", True)
    assert "start them with scripts/run_*_distributed.sh" in refusal(monkeypatch, capsys, text_to_image, words)
    for name, value in {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    line = refusal(monkeypatch, capsys, text_to_image, sampling(small, tmp_path))
    assert "mpirun started this as process 1 of 2" in line and "--use_parallel True" in line
