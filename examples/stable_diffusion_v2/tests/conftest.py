"""The environment of every test: MindSpore on a CPU in graph mode, in the folder that the commands are run from."""

import os
from pathlib import Path

from ldm import runtime


def pytest_configure(config):
    runtime.start("CPU")
    os.chdir(Path(__file__).parents[1])
