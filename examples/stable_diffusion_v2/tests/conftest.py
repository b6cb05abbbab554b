"""The environment of every test: MindSpore on a CPU in graph mode, in the folder that the commands are run from."""

import os
from pathlib import Path

from ldm import runtime


def pytest_configure(config):
    runtime.start("CPU")
    os.chdir(Path(__file__).parents[1])


LONG = ("test_ranks", "test_scripts", "test_adapters", "test_blockwise")  # first, or one worker ends long after others


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG)))
