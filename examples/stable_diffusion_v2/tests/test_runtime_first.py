"""Every script loads ldm.runtime before MindSpore, for it sets what MindSpore reads when it is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "eval", "tools")  # modules beside them are loaded by way of their package
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text() and "ldm" in path.read_text()
)
LOAD = """
import runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "mindspore":
            print(sys.argv[1], "runtime" if "ldm.runtime" in sys.modules else "no runtime")
            raise SystemExit

sys.meta_path.insert(0, Watch())
for script in sys.argv[1:]:
    sys.argv[1] = script
    for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "eval", "tools", "text_to_image")]:
        del sys.modules[name]
    try:
        runpy.run_path(script, run_name="loaded")
        print(script, "no MindSpore")
    except SystemExit:
        pass
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", LOAD, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_every_script_loads_the_runtime_first(found):
    assert found.keys() == set(SCRIPTS) and "text_to_image.py" in found
    assert not [script for script, said in found.items() if said == "no runtime"]
    assert sum(said == "runtime" for said in found.values()) >= 8
