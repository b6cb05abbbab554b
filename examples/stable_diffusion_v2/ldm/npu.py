"""What a machine shows of NPUs and of CANN, why MindSpore cannot use them, and what the chips can do.

It does not import MindSpore by itself: `ldm.runtime` hands it MindSpore's words.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

DEVICES = "/dev/davinci[0-9]*"
SET_ENV = (  # CANN before 8.5, and from 8.5 on, of root and of other users
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "/usr/local/Ascend/cann/set_env.sh",
    "~/Ascend/ascend-toolkit/set_env.sh",
    "~/Ascend/cann/set_env.sh",
)
DRIVER = ("libascend_hal", "libdrvdsmi", "libc_sec", "libmmpa")  # libraries of the driver, in /usr/local/Ascend/driver
FLASH = "LDM_FLASH_ATTENTION"
OVERFLOW_MODE = "MS_ASCEND_CHECK_OVERFLOW_MODE"
BY_CHOICE = f", or unset {OVERFLOW_MODE}, which asks for this"
ON_CPU = "to use the CPU all the same, add --device_target CPU"


class Chip(NamedTuple):
    """What decides how a chip is used.

    saturates: an overflow becomes the largest number and NaN becomes 0, so that a loss scale never sees an overflow.
    flash: it has the kernel of flash attention that is used here.
    bfloat16: it has this number type.
    """

    saturates: bool
    flash: bool
    bfloat16: bool


FIRST = Chip(saturates=True, flash=False, bfloat16=False)
SECOND = Chip(saturates=False, flash=True, bfloat16=True)
UNKNOWN = Chip(saturates=False, flash=False, bfloat16=True)
CHIPS = {  # names as CANN gives them; 910B alone is a chip of the first kind, 910B1 to 910B4 are Atlas A2
    r"Ascend910B[1-9].*|Ascend910_93.*": SECOND,
    r"Ascend910|Ascend910(A|B|ProA|ProB|PremiumA)|Ascend310.*": FIRST,
}


def chip(name: str) -> Chip:
    """What the chip of that name can do. A name that is not known here gets no flash attention."""
    known = next((kind for pattern, kind in CHIPS.items() if re.fullmatch(pattern, name)), UNKNOWN)
    return known._replace(saturates=known.saturates or saturates_by_choice())


def saturates_by_choice() -> bool:
    """Whether the environment asks a chip that could do otherwise to saturate."""
    return os.environ.get(OVERFLOW_MODE) == "SATURATION_MODE"


def allow_flash_attention(allowed: bool) -> None:
    """Say for this process and its children whether flash attention may be used."""
    os.environ[FLASH] = str(int(allowed))


def flash_attention(name: str) -> bool:
    """Whether flash attention is used on the chip of that name."""
    return chip(name).flash and os.environ.get(FLASH, "1") == "1"


def signs() -> list[str]:
    """What says that this machine is meant to have an NPU; nothing on a machine without one."""
    found = sorted(glob(DEVICES))[:1]
    if shutil.which("npu-smi"):
        found.append("npu-smi")
    if os.environ.get("ASCEND_HOME_PATH"):
        found.append("ASCEND_HOME_PATH")
    return found


def cann_version(env: Mapping[str, str] = os.environ) -> str | None:
    """The version of the CANN whose environment is set, as 8.5; None where none can be told."""
    file = Path(env.get("ASCEND_HOME_PATH") or "none") / "compiler" / "version.info"
    try:
        found = re.search(r"^Version=(\d+\.\d+)", file.read_text(errors="replace"), re.M)
    except OSError:
        return None
    return found[1] if found else None


def load_error(words: str) -> str:
    """The reason in what MindSpore says of a device that it does not have: why the first library does not load."""
    lines = [line.partition("failed.")[2].strip() for line in words.splitlines() if "Load dynamic library" in line]
    return next(filter(None, lines), words.strip().split("\n")[0])


def cause(words: str, devices: int, version: str, supported: Sequence[str]) -> str:
    """Why Ascend cannot be used, and what to do, in one line.

    Args:
        words: MindSpore's when the device was asked for; "" where it would take it.
        devices: how many MindSpore sees.
        version: MindSpore's.
        supported: the versions of CANN that it names.
    """
    if not words and not devices:
        return (
            "MindSpore sees no device: `npu-smi info` must list one, ASCEND_RT_VISIBLE_DEVICES must name one if it is "
            "set, and a container needs /dev/davinci0, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"
        )
    reason = load_error(words)
    return f"{reason}; {remedy(reason, version, supported)}"


def remedy(reason: str, version: str, supported: Sequence[str]) -> str:
    """What to do about a library that does not load."""
    wanted, cann = (
        f"MindSpore {version} works with CANN {' or '.join(supported) or 'of its release notes'}",
        cann_version(),
    )
    if not re.search(r"lib\w+\.so", reason):
        return "this MindSpore was built without Ascend: install the wheel for Linux of the official package index"
    if reason.startswith(DRIVER):
        return "this library is the driver's: install it, and in a container mount /usr/local/Ascend/driver"
    if not os.environ.get("ASCEND_HOME_PATH"):
        there = [path for path in SET_ENV if os.path.exists(os.path.expanduser(path))]
        return f"set CANN's environment in this shell: source {' or '.join(there or SET_ENV[:2])} ({wanted})"
    if cann and supported and cann not in supported:
        return f"CANN {cann} is set in this shell, but {wanted}: install one of these"
    return f"CANN in {os.environ['ASCEND_HOME_PATH']} is incomplete or of another version: {wanted}"
