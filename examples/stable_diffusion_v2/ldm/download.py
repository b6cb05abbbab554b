"""Downloads a file into a partial file, from which the next try goes on.

A second file beside it keeps the server's words about the version: its length, and its ETag or date. The next try asks
for the rest of this version. If the server has another version now, the try begins anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import claimed, sha256

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte

log = logging.getLogger(__name__)


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, one process at a time. The file appears only when it has all announced bytes.

    A name may end in eight hexadecimal digits, as in `sd_v2_base-57526ee4.ckpt`. They are compared with the beginning
    of the file's sha256. A difference is only a warning, because their meaning is not documented.

    Raises:
        UserError: the server cannot be reached or does not have the file, the disk is full, the connection breaks off,
            a web page came instead.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.parent, path.name, ""):
            _fetch(url, partial)
            _refuse_page(url, partial)
            os.replace(partial, path)
            _version_file(partial).unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url} answered {error.code} {error.reason}; get the file by hand and put it at {path}"
        ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        kept = f"{partial} is kept; the same command goes on from there" if partial.exists() else "nothing was written"
        raise UserError(f"cannot download {url}: {reason}; {kept}") from None
    _compare_digits(path)


def _fetch(url: str, partial: Path) -> None:
    response, have, version = _open(url, partial)
    with response:
        total, free = version["bytes"], shutil.disk_usage(partial.parent).free
        if total and total - have > free:
            needed, left = (f"{size / 2**30:.1f} GiB" for size in (total - have, free))
            raise UserError(f"{partial.parent} has {left} of disk left, {url} needs {needed}: make room there")
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem)
        with open(partial, "ab" if have else "wb") as file, bar:
            if not have:  # the old bytes are gone: write down the new version
                _version_file(partial).write_text(json.dumps(version), encoding="utf-8")
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = partial.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")


def _open(url: str, partial: Path) -> tuple[HTTPResponse, int, dict]:
    """(the server's answer, the number of bytes of the partial file that it continues, the version of both)."""
    have, version = _kept(url, partial)
    response = _ask_for_rest(url, have, version) if have else urllib.request.urlopen(url, timeout=TIMEOUT)
    if (
        response
        and response.status == 206
        and all(said in (None, version[name]) for name, said in _version(response, have).items())
    ):
        return response, have, version
    if response is None or response.status == 206:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    return response, 0, {"url": url, **_version(response, 0)}


def _ask_for_rest(url: str, have: int, version: dict) -> HTTPResponse | None:
    """Ask for the bytes of this version behind the first `have`, or for the whole file where the version is another.

    None where the file is not longer.
    """
    tag = version["ETag"] if not (version["ETag"] or "W/").startswith("W/") else version["Last-Modified"]
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return None


def _version(response: HTTPResponse, before: int) -> dict:
    """The server's words about a file of which it sends all but the first `before` bytes."""
    length = response.headers.get("Content-Length", "")
    said = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
    return {**said, "bytes": before + int(length) if length.isdecimal() else None}


def _version_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _kept(url: str, partial: Path) -> tuple[int, dict]:
    """(number of bytes of an earlier try, their version); (0, {}) where no try can be continued."""
    try:
        version = json.loads(_version_file(partial).read_text(encoding="utf-8"))
        known = isinstance(version, dict) and version.keys() == {"url", "ETag", "Last-Modified", "bytes"}
        known = known and version["url"] == url and any(version[name] for name in ("ETag", "Last-Modified", "bytes"))
        return (partial.stat().st_size, version) if known else (0, {})
    except (OSError, ValueError):
        return 0, {}


def _refuse_page(url: str, partial: Path) -> None:
    """UserError where a login page or a proxy's page came instead of the file."""
    with open(partial, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        partial.unlink()
        _version_file(partial).unlink(missing_ok=True)
        raise UserError(f"{url} answered with a web page: log in to the network, or get the file by hand")


def _compare_digits(path: Path) -> None:
    digits = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if digits:
        found = sha256(path).hex()
        if not found.startswith(digits[1]):
            log.warning("%s: its sha256 is %s, its name says %s", path, found, digits[1])
