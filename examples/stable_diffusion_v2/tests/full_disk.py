"""A full disk, without filling one: the kernel refuses to let any file of this process grow."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, writing beyond `size` bytes of a file raises OSError (EFBIG, "File too large").

    Keep the block to the call under test: pytest's own report may be a file too, and longer than `size`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
