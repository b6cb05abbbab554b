"""The only file that touches MindSpore's context: device, mode, communication, and what a script does with errors.

Import it before anything that imports mindspore: it sets the environment that MindSpore reads when it is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn

from ldm import npu
from ldm.config.options import str2bool
from ldm.errors import UserError
from ldm.files import escaped
from ldm.parallel.hub import HUB, LONGEST_LINE, scheduler_address
from ldm.parallel.ranks import Ranks, follow_hub, follow_parent, place, without_launcher
from ldm.signals import Signals, Stopped, blocked, exit_code, quiet

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings on a CPU are harmless and many
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle OpenMP threads would take the cores from MindSpore's own
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("MS_NODE_ID", "0")) != "0":
    os.environ["TQDM_DISABLE"] = "1"  # only rank 0 shows its progress

sys.excepthook = quiet
gc.disable()
with blocked():
    import mindspore as ms
    from mindspore import communication, nn

if tuple(int(part) for part in ms.__version__.split(".")[:2]) < (2, 5):
    sys.exit(
        f"error: MindSpore {ms.__version__} is too old: pip install mindspore==2.8.0, or 2.5 or later for your CANN"
    )
gc.enable()
gc.freeze()  # leave these objects alone: MindSpore collects garbage at every compilation, which took 0.08 s each time
DEVICES = ("Ascend", "GPU", "CPU")
DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
JIT_LEVELS = ("O0", "O1", "O2")
PRECISION_MODES = ("force_fp16", "allow_fp32_to_fp16", "allow_mix_precision", "must_keep_origin_dtype", "force_fp32")
PRECISION_MODES += ("allow_fp32_to_bf16", "allow_mix_precision_fp16", "allow_mix_precision_bf16")
HERE = Path(__file__).parents[1]
SLOW_ON_CPU = (2, 9)  # from this version on, CPU convolutions wider than 1×1 run some 300 times slower than in 2.8

log = logging.getLogger(__name__)


class AscendSettings(NamedTuple):
    """How an NPU computes; without effect on another device.

    jit_level: how much is compiled together. O0: kernel by kernel, O1: with fused element-wise chains, O2: one graph.
    precision_mode: how operators without an aclnn kernel may round; None leaves it to MindSpore.
    flash_attention: whether the operator of that name is used where it is known to be good.
    hf32: whether float32 convolutions may round their inputs to 11 bits, as MindSpore does by itself.
    """

    jit_level: str = "O0"
    precision_mode: str | None = None
    flash_attention: bool = True
    hf32: bool = True


def add_device_options(add: Callable) -> None:
    """Add the options of `start`; `ascend_settings` reads the last three."""
    add("--device_target", choices=DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", "--ms_mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--jit_level", choices=JIT_LEVELS, default="O0", help="of Ascend: how much is compiled together")
    add("--precision_mode", choices=PRECISION_MODES, help="of Ascend (default: MindSpore's own)")
    usual = "of Ascend: where it is known to be good"
    add("--enable_flash_attention", type=str2bool, default=True, help=usual)


def ascend_settings(args: argparse.Namespace, hf32: bool = True) -> AscendSettings:
    """The settings that a script's options ask for."""
    return AscendSettings(args.jit_level, args.precision_mode, args.enable_flash_attention, hf32)


def default_device() -> str:
    """Ascend where there is one, CPU where nothing says that there should be one.

    Raises:
        UserError: the machine has an NPU or CANN, but MindSpore cannot use it. A run on the CPU must be asked for.
    """
    found = npu.signs()
    if not (found or ms.hal.is_available("Ascend")):
        return "CPU"
    why = why_no_ascend()
    if why and found:
        raise UserError(f"this machine has {found[0]}, but Ascend cannot be used: {why}; {npu.ON_CPU}")
    return "CPU" if why else "Ascend"


@cache
def why_no_ascend() -> str:
    """Why MindSpore cannot use an NPU here, and what to do; "" where it can."""
    words, devices = "", 0
    if ms.hal.is_available("Ascend"):
        devices = ms.hal.device_count("Ascend")
    else:
        try:
            ms.set_device("Ascend")
        except (RuntimeError, ValueError) as error:
            words = str(error)
    return "" if devices else npu.cause(words, devices, ms.__version__, supported_cann())


def supported_cann() -> list[str]:
    """The versions of CANN that this MindSpore names itself; none where it cannot be told."""
    try:
        from mindspore.run_check._check_version import AscendEnvChecker

        return [str(version) for version in AscendEnvChecker(None).version]
    except (ImportError, AttributeError, TypeError):
        return []


def find_device(wanted: str | None) -> str:
    """The device that is wanted, or the default one.

    Raises:
        UserError: this machine or this build of MindSpore does not have the device.
    """
    device = wanted or default_device()
    if device == "Ascend" and (why := why_no_ascend()):
        raise UserError(f"Ascend cannot be used: {why}; {npu.ON_CPU}")
    if not ms.hal.is_available(device):
        raise UserError(f"device_target {device} is not available here; use --device_target CPU, or leave it out")
    return device


def chip() -> npu.Chip:
    """What the NPU of this machine can do."""
    return npu.chip(ms.hal.get_device_name(0, "Ascend"))


def start(
    device_target: str | None = None,
    mode: int = 0,
    ranks: Ranks | None = None,
    ascend: AscendSettings = AscendSettings(),  # noqa: B008  a constant
) -> str:
    """Set device and mode (0 graph, 1 PyNative) before the first tensor; returns the device in use.

    Several ranks of a host take a device each. A single process takes the device of DEVICE_ID, or the first one.

    Raises:
        UserError: this machine or this build of MindSpore does not have the device.
    """
    device = find_device(device_target)
    if device == "CPU":
        ms.set_device(device)
    else:
        ms.set_device(device, ranks.local_rank if ranks and ranks.size > 1 else int(os.environ.get("DEVICE_ID", 0)))
    ms.set_context(mode=mode)
    if device == "Ascend":
        _start_ascend(ascend)
    version = tuple(int(part) for part in ms.__version__.split(".")[:2])
    if device == "CPU" and version >= SLOW_ON_CPU:
        log.warning(
            "MindSpore %s runs convolutions on a CPU some 300 times slower than 2.8.0: pip install mindspore==2.8.0",
            ms.__version__,
        )
    return device


def _start_ascend(settings: AscendSettings) -> None:
    ms.set_context(jit_config={"jit_level": settings.jit_level})
    precision = ms.device_context.ascend.op_precision
    if settings.precision_mode:
        precision.precision_mode(settings.precision_mode)
    if not settings.hf32:
        precision.conv_allow_hf32(False)
        precision.matmul_allow_hf32(False)
    npu.allow_flash_attention(settings.flash_attention)
    cann, supported = npu.cann_version(), supported_cann()
    if cann and supported and cann not in supported:
        log.warning("MindSpore %s names CANN %s, not %s", ms.__version__, ", ".join(supported), cann)


def compute_dtype(wanted: str | None, device: str | None, training: bool = False) -> str:
    """The networks' number type: by default float16 on Ascend, float32 on a CPU, where half precision is slower, and
    for training where an overflow in float16 could not be seen.

    Raises:
        UserError: the device does not have the type that is wanted, or training in it would go wrong unseen.
    """
    device = find_device(device)
    if device == "CPU" and wanted == "bfloat16":
        _require_bfloat16(training)
    if device != "Ascend":
        return wanted or ("float32" if device == "CPU" else "float16")
    blind = training and chip().saturates
    if wanted == "bfloat16" and not chip().bfloat16:
        raise UserError("this chip has no bfloat16: leave out --dtype, or use float32 or, for drawing, float16")
    if wanted == "float16" and blind:
        raise UserError(
            "this chip turns an overflow in float16 into the largest number, so the loss scale would never see one: "
            f"train in --dtype float32{npu.BY_CHOICE if npu.saturates_by_choice() else ''}"
        )
    return wanted or ("float32" if blind else "float16")


def _require_bfloat16(training: bool) -> None:
    """UserError unless a CPU can draw with products in bfloat16."""
    from ldm.kernels import products  # here, because networks come after `start`

    if training:
        raise UserError("bfloat16 on a CPU is for drawing: leave out --dtype, and training is in float32")
    if not products.multiplies_bfloat16():
        why = "this CPU does not multiply bfloat16 numbers, or the CPU kernels are not compiled"
        raise UserError(f"{why}, so there is nothing to gain: leave out --dtype")


def set_compute_dtype(net: nn.Cell, dtype: str, weights: bool = False) -> None:
    """Let the layers that multiply matrices work in `dtype`; softmax stays in float32.

    Parameters and norms stay in float32 too, unless the `weights` are cast, once for all calls. The network cannot be
    trained then.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and ms.get_context("device_target") == "CPU":  # only inputs of products are rounded
        for _, cell in net.cells_and_names():
            if hasattr(cell, "in_bfloat16"):
                cell.in_bfloat16()
    elif dtype != "float32":
        for _, cell in net.cells_and_names():
            if getattr(cell, "multiplies", False):
                cell.to_float(DTYPES[dtype])
        for parameter in net.get_parameters() if weights else ():
            parameter.set_dtype(DTYPES[dtype])


def give_back_memory() -> None:
    """Return free memory to the system: of deleted networks' parameters, of compiling."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # glibc's; without it memory is only returned later
        ctypes.CDLL(None).malloc_trim(0)


def join(use_parallel: bool) -> Ranks:
    """Meet the other processes of the run, if there are any; returns the ranks.

    Raises:
        UserError: `use_parallel` without a launcher, or the other way round; not all ranks have come.
    """
    global _ranks
    found = place()
    if found is None or not use_parallel:
        if use_parallel:
            raise UserError("use_parallel needs several processes: start them with scripts/run_*_distributed.sh")
        if found and found.size > 1:
            raise UserError(
                f"{found.launcher} started this as process {found.rank} of {found.size}, each of which would do all "
                "the work: add --use_parallel True"
            )
        return _ranks
    if found.size > 1 or HUB in os.environ:
        follow_parent()
        if found.rank:
            silence()
        _ranks = Ranks(found.rank, found.size, found.local_rank)
        _ranks.connect(signals.tell)
    return _ranks


def silence() -> None:
    """Log errors alone: of several processes that do the same, only the first one reports."""
    logging.getLogger().setLevel(logging.ERROR)


def connect_devices(ranks: Ranks, device: str) -> None:
    """Connect the devices of all ranks, before the first tensor; `ops.AllReduce` needs it.

    MindSpore's processes find one another through a scheduler. msrun brings one, and mpirun needs none on Ascend. On a
    CPU, MindSpore does not know mpirun: rank 0 starts a scheduler, and every rank tells MindSpore its place.
    """
    if ranks.size == 1:
        return
    os.environ["MS_NODE_TIMEOUT"] = os.environ.get("LDM_COLLECTIVE_SECONDS", "1800")  # of a collective; see `schedule`
    if device == "CPU" and "MS_ROLE" not in os.environ:
        host, port = scheduler_address()
        told = {"MS_SCHED_HOST": host, "MS_SCHED_PORT": port, "MS_WORKER_NUM": ranks.size, "RANK_SIZE": ranks.size}
        told = {name: str(value) for name, value in told.items()}
        if ranks.is_main:
            start_scheduler({**without_launcher(), **told, "MS_ROLE": "MS_SCHED"})
        own = {"MS_NODE_ID": ranks.rank, "RANK_ID": ranks.rank, "DEVICE_ID": ranks.local_rank}
        os.environ.update(told, MS_ROLE="MS_WORKER", **{name: str(value) for name, value in own.items()})
    communication.init()


def start_scheduler(env: Mapping[str, str]) -> subprocess.Popen:
    """Start a process that is MindSpore's scheduler as long as this one lives."""
    command = [sys.executable, "-c", "from ldm import runtime; runtime.schedule()"]
    return subprocess.Popen(command, env=env, cwd=HERE, stdout=subprocess.DEVNULL)


def schedule() -> None:
    """Be the scheduler; MindSpore does not return from it while there are ranks."""
    follow_parent()
    os.environ["MS_NODE_TIMEOUT"] = "15"  # here: seconds of silence after which a rank counts as lost
    ms.set_device("CPU")
    communication.init()


_ranks = Ranks()  # `run` leaves them
_until_end = contextlib.ExitStack()  # `run` closes it
signals = Signals()


def until_end(context: contextlib.AbstractContextManager) -> None:
    """Enter a context that lasts until the script's end."""
    _until_end.enter_context(context)


def run(main: Callable[[], None], communicates: bool = False) -> None:
    """Run a script's main: a UserError becomes one line and exit code 1, a signal one line and its exit code.

    Args:
        main: the script.
        communicates: `main` calls `connect_devices`, so the process that msrun starts as the scheduler is needed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        if communicates and os.environ.get("MS_WORKER_NUM") != "1":
            # In a child process, to be killed: by itself it takes ranks that have ended for lost, and msrun fails.
            scheduler = start_scheduler(os.environ)
            follow_hub()
            scheduler.kill()
        return
    with signals.listening():
        _guarded(main)


def _guarded(main: Callable[[], None]) -> None:
    try:
        with _until_end:
            main()
        _leave(0)
    except Stopped as stop:
        _leave(stop.code)
        sys.exit(stop.code)
    except UserError as error:
        line = escaped(error, LONGEST_LINE)  # one line, whatever a file has put into it
        if _ranks.connection:
            _ranks.fail(line)
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        _end_by_signal()
    except Exception as error:
        if signals.interrupts:  # MindSpore turns an interrupt into other errors while it compiles
            _end_by_signal()
        if not _ranks.connection:
            raise
        traceback.print_exc()
        _ranks.fail(f"rank {_ranks.rank} ended with {type(error).__name__}: {error}; the traceback is in its output")


def _leave(code: int) -> None:
    """End this process together with the other ranks, if there are any."""
    if _ranks.connection:
        _ranks.leave(code)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # all is done; MindSpore's network threads sometimes crash at the end


def _end_by_signal() -> NoReturn:
    number = signals.asked or signal.SIGINT
    if _ranks.connection:
        _ranks.interrupted(number)
    sys.exit(exit_code(number))
