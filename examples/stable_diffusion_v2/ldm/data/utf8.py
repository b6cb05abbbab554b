"""Text files that people write, captions and prompts: UTF-8, or one line that says what they are instead."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import UserError
from ldm.files import escaped


def read_text(path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; line ends stay as they are.

    Raises:
        UserError: the file (the `what` of the message) cannot be read, is UTF-16, of an older encoding, or no text.
    """
    name = f"the {what} {escaped(path, 200)}"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is UTF-16, not UTF-8 text: save it as UTF-8")
    if b"\0" in data:
        line = 1 + data[: data.index(b"\0")].count(b"\n")
        raise UserError(f"{name} holds a NUL in line {line}, so it is UTF-16 or no text: save it as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = 1 + data[: error.start].count(b"\n"), data[error.start]
        raise UserError(
            f"{name} is not UTF-8 text: line {line} holds the byte 0x{byte:02x}, as files of Windows do (cp1252); "
            "save it as UTF-8"
        ) from None
