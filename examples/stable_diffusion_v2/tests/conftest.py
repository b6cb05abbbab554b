"""The environment of every test: MindSpore on a CPU in graph mode, in the folder that the commands are run from."""

import gc
import os
from pathlib import Path

from ldm import runtime

JEMALLOC = Path(runtime.ms.__file__).parent / "lib/libjemalloc.so.2"


def pytest_configure(config):
    runtime.start("CPU")
    os.chdir(Path(__file__).parents[1])
    if JEMALLOC.exists():  # for the workers and the scripts: compiling a graph takes a quarter less with it
        os.environ.setdefault("LD_PRELOAD", str(JEMALLOC))


LONG = ("test_ranks", "test_scripts", "test_adapters", "test_blockwise")  # first, or one worker ends long after others


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # as in ldm/runtime.py: MindSpore collects garbage at every compilation
