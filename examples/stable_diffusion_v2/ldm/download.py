"""A file from the web, into a partial file that the next try goes on with."""

from __future__ import annotations

import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import sha256

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte

log = logging.getLogger(__name__)


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, which appears only when all bytes that the server announced are there.

    Where the name ends in eight hexadecimal digits, as in `sd_v2_base-57526ee4.ckpt`, they are compared with the
    beginning of the file's sha256, and a difference is warned of: whose digits they are is not documented.

    Raises:
        UserError: the server cannot be reached or does not have the file, the disk is full, the connection breaks off,
            a web page came instead.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        _fetch(url, partial, have)
        _refuse_page(url, partial)
        os.replace(partial, path)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url} answered {error.code} {error.reason}; get the file by hand and put it at {path}"
        ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        kept = f"{partial} is kept; the same command goes on from there" if partial.exists() else "nothing was written"
        raise UserError(f"cannot download {url}: {reason}; {kept}") from None
    _compare_digits(path)


def _fetch(url: str, partial: Path, have: int) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the partial file is not shorter than the whole one
            raise
        partial.unlink()
        response, have = urllib.request.urlopen(url, timeout=TIMEOUT), 0
    with response:
        if response.status != 206:  # the server gives whole files only
            have = 0
        announced = response.headers.get("Content-Length")
        total = have + int(announced) if announced else None
        free = shutil.disk_usage(partial.parent).free
        if total and total - have > free:
            needed, left = (f"{size / 2**30:.1f} GiB" for size in (total - have, free))
            raise UserError(f"{partial.parent} has {left} of disk left, {url} needs {needed}: make room there")
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem)
        with open(partial, "ab" if have else "wb") as file, bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = partial.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")


def _refuse_page(url: str, partial: Path) -> None:
    """UserError where a login or a proxy has answered with a page of its own."""
    with open(partial, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        partial.unlink()
        raise UserError(f"{url} answered with a web page: log in to the network, or get the file by hand")


def _compare_digits(path: Path) -> None:
    digits = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if digits:
        found = sha256(path).hex()
        if not found.startswith(digits[1]):
            log.warning("%s: its sha256 is %s, its name says %s", path, found, digits[1])
