"""Count what a log of run.sh holds.

python summary.py LOG                the whole log; a line "=== title" in it (a test may write one) begins a part
python summary.py LOG --lines NAME   the different calls of one kernel, with their number ("aclop": all of those)
"""

import argparse
import math
import re
import signal
from collections import Counter

TENSOR = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def parse(line):
    """(interface, kernel, [(dtype, shape), ...]) of one line; an aclnn kernel's outputs come last."""
    interface, _, rest = line.strip().partition(" ")
    if interface.startswith("aclnn"):
        interface, kernel = "aclnn", interface
    else:
        kernel, _, rest = rest.partition(" ")
    tensors = [(t, tuple(int(d) for d in shape.split(",") if d)) for t, shape in TENSOR.findall(rest)]
    return interface, kernel, tensors


def table(title, counter, limit=60):
    if not counter:
        return
    print(f"  {title}")
    for key, n in counter.most_common(limit):
        print(f"    {n:7d}  {key}")
    if len(counter) > limit:
        print(f"             and {len(counter) - limit} more")


def summarize(title, lines):
    kernels, dtypes, casts, elements, older, candidates, collectives, runtime = (Counter() for _ in range(8))
    for line in lines:
        interface, kernel, tensors = parse(line)
        seen = " ".join(dict.fromkeys(dtype for dtype, _ in tensors))
        if interface == "hccl":
            collectives[f"{kernel}  {seen}"] += 1
        elif interface == "geop":
            candidates[kernel] += 1
        elif interface == "rt":
            runtime[kernel] += 1
        elif interface in ("aclnn", "aclop"):
            kernels[f"{kernel}  {seen}" if interface == "aclnn" else f"aclop {kernel}  {seen}"] += 1
            dtypes.update(seen.split())
            if interface == "aclop":
                older[kernel] += 1
            if kernel == "aclnnCast" and len(tensors) > 1:
                pair = f"{tensors[0][0]} -> {tensors[-1][0]}"
                casts[pair] += 1
                elements[pair] += math.prod(tensors[0][1])
    print(f"{title}: {sum(kernels.values())} kernels launched")
    table("kernels, and the dtypes of their tensors in order of appearance", kernels)
    table("dtypes (kernels that touch one)", dtypes)
    table("casts", Counter({f"{pair}  ({elements[pair]:,} elements)": n for pair, n in casts.items()}))
    table("of the kernels, those called through the older interface aclop", older)
    table("collectives", collectives)
    table("operators that selection looked up in the graph engine: candidates for aclop", candidates)
    table("runtime calls (STUB_TRACE=1)", runtime)


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for "| head"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log")
    parser.add_argument("--lines", metavar="NAME")
    args = parser.parse_args()
    with open(args.log, encoding="utf-8") as f:
        lines = [line.strip() for line in f if line.strip()]
    if args.lines:
        table(args.lines, Counter(line for line in lines if args.lines in line.split()[:2]), limit=1000)
        return
    parts = [("before the first part" if any(line.startswith("===") for line in lines) else "whole log", [])]
    for line in lines:
        if line.startswith("==="):
            parts.append((line.strip("= "), []))
        else:
            parts[-1][1].append(line)
    for title, part in parts:
        if part or len(parts) == 1:
            summarize(title, part)


if __name__ == "__main__":
    main()
