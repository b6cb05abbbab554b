"""Check an Ascend machine, from the driver to training: the first command on a new one.

    python tools/check_ascend.py                # minutes; a line per item, ok or FAIL with its cause and what to do
    python tools/check_ascend.py --ranks 8      # the connections of 8 devices as well

The last lines are to be pasted into a report. Exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

from ldm import npu  # noqa: E402
from ldm.config.options import Parser, read_options  # noqa: E402
from ldm.files import quoted  # noqa: E402
from tools.ascend_checks import machine  # noqa: E402
from tools.ascend_checks.machine import Finding, guarded  # noqa: E402

DTYPES = {"Ascend": ("float16", "bfloat16"), "CPU": ("float32", "float16")}
WIDTHS, HEAD = {"Ascend": 320, "CPU": 64}, 64
SUM_MEGABYTES, SUMS = 64, 5


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device_target", choices=("Ascend", "CPU"), default="Ascend", help="CPU: the same checks, to try them")
    add("--ranks", type=int, default=0, help="check the connections of that many devices too")
    usual = "default: 320, SD 2.x's, and 64 on a CPU; 0 measures none"
    add("--width", type=width, help=f"of the UNet whose speed in drawing and training is measured ({usual})")
    add("--short", action="store_true", help="fewer shapes of attention")
    # A part is done by a process of its own.
    add("--part", choices=("drawing", "training", "sum", "reference"), help=argparse.SUPPRESS)
    add("--jit_level", default="O0", help=argparse.SUPPRESS)
    add("--use_parallel", help=argparse.SUPPRESS)
    return parser


def width(text: str) -> int:
    """Of a UNet whose heads have 64 channels; for `type=`."""
    if not text.isdecimal() or int(text) % HEAD:
        raise argparse.ArgumentTypeError(f"expected a multiple of {HEAD}, or 0 to measure no speed, got {quoted(text)}")
    return int(text)


def mindspore_findings(device: str) -> Iterator[Finding]:
    """MindSpore's version, whether it takes the device, and the chip."""
    from ldm import runtime

    supported, cann = runtime.supported_cann(), npu.cann_version()
    yield Finding("MindSpore", True, f"{runtime.ms.__version__}, names CANN {', '.join(supported)}")
    if device == "CPU":
        return
    fits = cann in supported
    mend = f"install CANN {' or '.join(supported)}, or the MindSpore that names yours (docs/ascend.md)"
    yield Finding("CANN for this MindSpore", fits, str(cann), mend)
    if why := runtime.why_no_ascend():
        yield Finding("MindSpore takes the device", False, why)
        return
    name = runtime.ms.hal.get_device_name(0, "Ascend")
    chip, properties = npu.chip(name), runtime.ms.hal.get_device_properties(0, "Ascend")
    known = "known here" if chip != npu.UNKNOWN else "not known here, so without flash attention"
    yield Finding("chip", chip != npu.UNKNOWN, f"{name}, {known}", "report it, with the whole block below")
    free, total = (getattr(properties, f"{kind}_memory", 0) / 2**30 for kind in ("free", "total"))
    mend = "see in `npu-smi info` which process takes it"
    yield Finding("free memory", free > 0.5 * total, f"{free:.1f} of {total:.1f} GiB", mend)


def compute_findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Operators, model and speed, on the device."""
    import numpy as np

    from ldm import runtime

    runtime.start(args.device_target)
    np.seterr(all="ignore")  # a device that computes NaN is a line of the report, not a warning
    from tools.ascend_checks import model, operators

    dtypes = DTYPES[args.device_target]
    if args.device_target == "Ascend" and not runtime.chip().bfloat16:
        dtypes = dtypes[:1]
    yield from operators.findings(dtypes, *(((40, 160), (77, 256)) if args.short else ()))
    yield from model.findings(dtypes, weights=args.device_target != "CPU")
    wide = WIDTHS[args.device_target] if args.width is None else args.width
    levels = ("O0", "O1") if args.device_target == "Ascend" else ("O0",)  # a CPU compiles alike in both
    for part, level in itertools.product(model.SPEEDS, levels if wide else ()):
        what = f"{part} with SD 2.x's UNet at width {wide}, {level}"
        words = ["--part", part, "--jit_level", level, "--width", str(wide), "--device_target", args.device_target]
        yield guarded(what, lambda what=what, words=words: speed(what, words))


def speed(what: str, words: list[str]) -> Finding:
    """What a process of its own, started with these options, says of the speed."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=3600, check=False)
    last = ((done.stderr if done.returncode else done.stdout).strip().split("\n") or [""])[-1]
    return Finding(what, not done.returncode, last, "paste the whole report")


def sums(args: argparse.Namespace) -> Finding:
    """AllReduce of all ranks, by our launcher."""
    words = [sys.executable, "-m", "ldm.parallel.launch", "tools/check_ascend.py", "--device", args.device_target]
    words += ["--ranks", str(args.ranks), "--", "--part", "sum"]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=1200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("sum of")]
    said = lines[-1] if lines else (done.stderr.strip().split("\n") or [""])[-1]
    mend = "see docs/ascend.md, When it hangs"
    return Finding(f"AllReduce of {args.ranks} ranks", not done.returncode and bool(lines), said, mend)


def sum_of_ranks(device: str) -> None:
    """As one of several ranks: sums of known numbers, and how fast they come."""
    import numpy as np
    from mindspore import Tensor, nn, ops

    from ldm import runtime
    from ldm.errors import UserError

    class Sum(nn.Cell):
        def __init__(self):
            super().__init__()
            self.sum = ops.AllReduce()

        def construct(self, x):
            return self.sum(x)

    ranks = runtime.join(True)
    runtime.connect_devices(ranks, runtime.start(device, 0, ranks))
    total, own, net = ranks.size * (ranks.size + 1) / 2, np.full(SUM_MEGABYTES << 18, ranks.rank + 1, np.float32), Sum()
    seconds = []
    for _ in range(SUMS + 1):
        ranks.barrier("sum")
        began = time.perf_counter()
        result = net(Tensor(own)).asnumpy()
        seconds.append(time.perf_counter() - began)
        if not (result == total).all():
            raise UserError(f"rank {ranks.rank}: the sum is {result[0]}, not {total}")
    if ranks.is_main:
        rate = (SUM_MEGABYTES / 1024) / float(np.median(seconds[1:]))
        print(f"sum of {ranks.size} ranks is right, {rate:.2f} GB/s with the copies to and from the host", flush=True)


def report(args: argparse.Namespace) -> Iterator[Finding]:
    if args.device_target == "Ascend":
        yield from machine.findings()
    if importlib.util.find_spec("mindspore") is None:
        yield Finding("MindSpore", False, "not installed", "pip install mindspore==2.8.0")
        return
    good = True
    for finding in mindspore_findings(args.device_target):
        good = good and finding.what != "MindSpore takes the device"
        yield finding
    if good:
        yield from compute_findings(args)
        if args.ranks:
            yield guarded("AllReduce", lambda: sums(args))


def do_part(args: argparse.Namespace) -> None:
    """The work of a process that another one has started."""
    from ldm import runtime

    if args.part == "sum":
        sum_of_ranks(args.device_target)
        return
    runtime.start(args.device_target, ascend=runtime.AscendSettings(args.jit_level))
    from tools.ascend_checks import model

    if args.part == "reference":
        model.write_reference()
        return
    side, runs = (16, 2) if args.device_target == "CPU" else (64, 20)
    dtype = runtime.compute_dtype(None, args.device_target, training=args.part == "training")
    print(model.SPEEDS[args.part](args.width, side, dtype, runs))


def main() -> None:
    args = read_options(build_parser())
    if args.part:
        do_part(args)
        return
    failed, lines = 0, []
    for finding in report(args):
        print(finding, flush=True)
        failed += finding.ok is False
        lines.append(str(finding))
    print("\n---- to be pasted into a report ----", *machine.facts(), *lines, sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if importlib.util.find_spec("mindspore"):
        from ldm import runtime

        runtime.run(main, communicates=True)
    else:
        main()
