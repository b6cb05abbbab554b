"""The environment of every test: quiet MindSpore on a CPU, in graph mode as users run it."""

import os

os.environ.setdefault("GLOG_v", "3")


def pytest_configure(config):
    os.chdir(config.rootpath / "examples/stable_diffusion_v2")  # the folder that the commands are run from
