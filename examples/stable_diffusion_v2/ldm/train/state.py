"""The resume state: everything that a run needs to go on as if it had never stopped, bit for bit on one device.

It is one .safetensors file beside the exported weights, with the raw weights, the moving average and the optimizer's
tensors. Its metadata hold the counters, the caller's progress and the settings that must stay the same. The file is
replaced as a whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, dtype_to_nptype

from ldm import checkpoint
from ldm.checkpoint import formats
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.train.step import TrainStep

RESUME_NAME = "train_resume.safetensors"
_KEY, _VERSION = "train_state", 1
# Settings that states were once without.
_LATER = ("text.padding", "vae.force_upcast", "data", "picture_contents", "frozen", "max_grad_norm")
_NO_LONGER = ("schedule.spacing", "vae.double_z", "double_z")  # settings that states were written with once
_DOOMED = ".deleted"  # the end of a checkpoint's name while it is removed
_CHECKPOINT = re.compile(r"(sd|student)-\d+(\.ckpt|\.safetensors)?|step\d+")  # or a folder of diffusers' or PEFT's


def resume_path(resume: str | bool, folder: str | Path) -> Path | None:
    """The file to resume from: this run's own in ``folder``, or a file or folder that the user named.

    None where nothing is to be resumed; UserError where the file does not exist.
    """
    word = str(resume).strip().lower()
    if word in ("", "false", "no", "none", "0"):
        return None
    path = Path(folder if word in ("true", "yes", "1") else str(resume))
    path = path if os.path.isfile(path) or path.suffix == Path(RESUME_NAME).suffix else path / RESUME_NAME
    if not os.path.isfile(path):
        raise UserError(f"cannot resume: {path} does not exist; leave out --resume to start from the beginning")
    return path


def refuse_used_folder(folder: Path, resume_from: Path | None) -> None:
    """UserError where this run would replace another run's state."""
    state = folder / RESUME_NAME
    if not state.exists() or (resume_from and resume_from.samefile(state)):
        return
    if resume_from and resume_from.parent.samefile(folder):
        raise UserError(f"{state} is of another time: to go back to {resume_from}, move it there and use --resume True")
    raise UserError(f"{folder} holds a run: go on with it by --resume True, or choose another --output_path")


def state_bytes(train_step: TrainStep) -> int:
    """The size of the file that `save_state` writes."""
    return sum(4 * variable.size for variable in train_step.variables().values())


def check_room(folder: str | Path, needed: int, *replaced: str | Path) -> None:
    """UserError where the disk of `folder` has fewer than `needed` bytes left. Files in `replaced` count as room."""
    free = shutil.disk_usage(folder).free
    free += sum(Path(path).stat().st_size for path in replaced if Path(path).exists())
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB of disk left, a checkpoint and the resume state need "
            f"{needed / 2**30:.1f} GiB: make room there or choose another --output_path"
        )


def save_state(path: str | Path, train_step: TrainStep, progress: dict, settings: dict) -> None:
    """Write the state of a run.

    Args:
        path: the file; an old one stays until the new one is complete and on the disk.
        train_step: holds the tensors and the counters.
        progress: where the run stands (step, epoch, position in the data, best numbers, ...); anything JSON can hold.
        settings: what must not change when the run goes on (prediction type, schedule, architecture, batch size, ...).

    Raises:
        UserError: the file cannot be written.
    """
    record = {"version": _VERSION, "counters": train_step.counters(), "progress": progress, "settings": settings}
    tensors = {name: param.asnumpy() for name, param in train_step.variables().items()}
    formats.write(path, tensors, {_KEY: json.dumps(record)}, "safetensors")


def load_state(path: str | Path, train_step: TrainStep, settings: dict) -> dict:
    """Restore the state of a run; returns its progress.

    Raises:
        UserError: the file is missing, damaged, of another kind, of another model, or of a run with other settings.
            Then nothing is changed.
    """
    tensors, record = _read(path)
    _check_settings(path, record["settings"], settings, {*record["settings"], *settings})
    variables = train_step.variables()
    tensors = checkpoint.match(tensors, {name: param.shape for name, param in variables.items()}, path)
    for name, param in variables.items():
        if tensors[name].dtype != dtype_to_nptype(param.dtype):
            raise _damaged(path, f"{name} is {tensors[name].dtype}")
    counters = _counters(path, record["counters"], train_step.counters())
    for name, param in variables.items():
        param.set_data(Tensor(np.array(tensors[name])))
    train_step.set_counters(counters)
    return record["progress"]


def check_settings(path: str | Path, settings: dict) -> None:
    """The checks of `load_state` that need no network: the file, and these settings; the state may have more."""
    _check_settings(path, _read(path)[1]["settings"], settings, set(settings))


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The state's tensors, and the record in its metadata."""
    tensors, strings, _ = formats.read(path)
    if _KEY not in strings:
        raise UserError(f"{path} is not a resume state; give weights as --pretrained_model_path instead")
    return tensors, _record(path, strings[_KEY])


def _record(path: str | Path, text: str) -> dict:
    """The record in a state's metadata; UserError where it is not as `save_state` writes it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, f"its {_KEY} is not JSON") from None
    if not isinstance(record, dict):
        raise _damaged(path, f"its {_KEY} is no table")
    version = record.get("version")
    if type(version) is int and version != _VERSION:
        raise UserError(f"{path} was written by another version of this program; start from its last checkpoint")
    for key in ("counters", "progress", "settings"):
        if type(version) is not int or not isinstance(record.get(key), dict):
            raise _damaged(path, f"its {_KEY} lacks its version or the table of its {key}")
    if not _is_count(record["progress"].get("step")):
        raise _damaged(path, f"its step is {quoted(record['progress'].get('step'))}")
    written = record["progress"].get("written", [])
    if not isinstance(written, list) or not all(isinstance(n, str) and _CHECKPOINT.fullmatch(n) for n in written):
        raise _damaged(path, f"the checkpoints that it has written are {quoted(written)}")
    return record


def _counters(path: str | Path, there: dict, wanted: dict[str, float]) -> dict[str, float]:
    """The counters of a state; UserError where one is not of the same kind as the run's own."""
    for name, now in wanted.items():
        value = there.get(name)
        is_scale = isinstance(now, float) and type(value) in (int, float) and 0 < value < math.inf
        if not is_scale and (isinstance(now, float) or not _is_count(value)):
            raise _damaged(path, f"its counter {name} is {quoted(value)}")
    return there


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _damaged(path: str | Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; start from its last checkpoint")


def _check_settings(path: str | Path, then: dict, now: dict, keys: set[str]) -> None:
    now = json.loads(json.dumps(now))
    older = {key for key in _LATER if key not in then} | {*_NO_LONGER}
    changed = [key for key in sorted(keys - older) if then.get(key) != now.get(key)]
    if changed:
        pairs = ((escaped(key), *(_value(values.get(key)) for values in (then, now))) for key in changed[:3])
        told = ", ".join(f"{key} was {old} and is now {new}" for key, old, new in pairs)
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{path} belongs to a run with other settings: {told}{more}; restore them to resume it")


def _value(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else escaped(value)


def prune(folder: str | Path, written: Sequence[str], keep: int) -> list[str]:
    """Delete all but the last ``keep`` of the checkpoints that this run has written (0 keeps all).

    Args:
        folder: where they are.
        written: their file names, oldest first; other files are never touched. A resumed run gets the list back with
            its progress.

    Returns:
        the names of the checkpoints that stay.
    """
    if not all(_CHECKPOINT.fullmatch(name) for name in written):
        raise ValueError(f"not all of {written} are checkpoints")
    names = list(dict.fromkeys(reversed(written)))[::-1]  # a name's last place counts
    old = names[:-keep] if keep else []
    for name in old:
        delete(Path(folder) / name)
    return names[len(old) :]


def delete(path: Path) -> None:
    """Remove a checkpoint: rename it first, so that no part of it keeps its name. Leftovers of killed runs go too."""
    doomed = path.with_name(path.name + _DOOMED)
    with suppress(OSError):
        os.replace(path, doomed)
    for left in path.parent.glob(f"*{_DOOMED}"):
        if _CHECKPOINT.fullmatch(left.name.removesuffix(_DOOMED)):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
