"""Find out what MindSpore's Ascend plugin wants of CANN, and write the stubs that need no thought.

python generate.py MINDSPORE_FOLDER CANN_STUB_CC OUT_FOLDER CANN_FOLDER
writes OUT_FOLDER/generated.inc, and OUT_FOLDER/libraries.txt, the names under which CANN_FOLDER/lib64 must offer it.

Three sources: undefined symbols (nm), names that the plugin looks up at run time (they stand in it as strings), and
the names of the libraries it is linked to.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

X86_64 = 62
# Looked up with dlsym: runtime, collectives, driver, profiling, and helpers of the kernel library.
PREFIXES = rb"acl|Hccl|Hcom|hal[A-Z]|rt[A-Z]|mstx"
HUGE_MEMORY = {"InitHugeMemThreadLocal", "UnInitHugeMemThreadLocal", "ReleaseHugeMem"}  # no strings of their own
LOOKED_UP = re.compile(rb"(?<![^\0])((?:" + PREFIXES + rb")[A-Za-z0-9_]+)(?=\0)")
OPENED = re.compile(rb"lib64/(?:driver/)?(lib\w+\.so)(?=\0)")
NOT_OFFERED = {"libascend_ml.so"}  # optional, and MindSpore does well without


def run(*command, stdin=None):
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False).stdout.splitlines()


def machine(path):
    head = path.read_bytes()[:20]
    return int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None


def symbols(path, kind):
    """Dynamic symbols without a version (those with one belong to the system's libraries); no weak ones."""
    rows = (line.split() for line in run("nm", "-D", f"--{kind}-only", str(path)))
    return {row[-1] for row in rows if kind == "defined" or row[-2] == "U"}


def opens(name):
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        return True
    except OSError:
        return False


def c_stub(name):
    reports = name.startswith(("aclrt", "aclInit", "Hccl", "Hcom")) and name != "aclrtAllocatorCreateDesc"
    if re.search("[Cc]reate", name) and not reports:
        return f'STUB void *{name}() {{ trace("{name}"); return calloc(1, 4096); }}'  # makers give a handle
    return f'STUB long {name}() {{ trace("{name}"); return 0; }}'  # 0 is success


def cpp_stub(symbol, readable):
    """The graph engine's C++ classes, under their mangled names: enough for kernel selection, not for whole graphs.

    A class is a handle or two inside. A constructor clears it; a result by value is cleared at the address the
    caller gives first; setters return the object itself.
    """
    constructor = re.match(r"ge::(\w+)::\1\(", readable)
    if constructor:
        if constructor[1].endswith("Register"):  # nothing inside, and static: its neighbour begins right behind
            return f"STUB void {symbol}(void *) {{}}"
        size = 24 if constructor[1] == "Operator" else 16
        return f"STUB void {symbol}(void *self) {{ memset(self, 0, {size}); }}"
    if "IsExistOp(char const*)" in readable:
        return f"STUB int {symbol}(const char *type) {{ return known_prototype(type); }}"
    if "IsExistOp(" in readable:  # a std::string begins with the pointer to its characters
        return f"STUB int {symbol}(const char **type) {{ return known_prototype(*type); }}"
    if "CreateOperator(" in readable:
        return f"STUB void *{symbol}(void *result) {{ memset(result, 0, 24); return result; }}"
    if re.match(r"ge::(Operator|Graph|GNode)::(Set|Add|Update)", readable):
        return f"STUB void *{symbol}(void *self) {{ return self; }}"
    if readable.startswith("ge::AscendString::GetString"):
        return f'STUB const char *{symbol}() {{ return ""; }}'
    if re.search(r"::Get(Shape|OriginShape|TensorDesc|OutputDesc|Name|OpType|Dims)\(", readable):
        return f"STUB void *{symbol}(void *result) {{ memset(result, 0, 32); return result; }}"
    return f"STUB long {symbol}() {{ return 0; }}"


def main(mindspore, stub_source, out, cann):
    every = [p for p in mindspore.rglob("*.so*") if "gpu" not in str(p) and p.is_file() and machine(p) == X86_64]
    plugin = mindspore / "lib/plugin"
    ours = [p for p in every if p.parent in (plugin, plugin / "ascend") and "cpu" not in p.name]
    ours += [p for p in every if p.name == "libshmem.so"]
    if not any(p.name.startswith("libmindspore_ascend.so") for p in ours):
        sys.exit(f"{plugin} has no Ascend plugin for x86-64")

    needed = {name for p in ours for name in re.findall(r"NEEDED.*\[(.*)\]", "\n".join(run("readelf", "-d", str(p))))}
    needed -= {p.name for p in every}
    strings = b"\0".join(p.read_bytes() for p in ours)
    libraries = {name for name in needed if not opens(name)} | {n.decode() for n in OPENED.findall(strings)}
    libraries -= NOT_OFFERED

    wanted = set().union(*(symbols(p, "undefined") for p in ours))
    wanted = {s for s in wanted if "@" not in s}
    for p in every:
        wanted -= {s.split("@")[0] for s in symbols(p, "defined")}
    process = ctypes.CDLL(None)  # Python itself, and the system libraries opened above
    wanted = {s for s in wanted if not hasattr(process, s)}
    looked_up = {n.decode() for n in LOOKED_UP.findall(strings)}
    looked_up |= HUGE_MEMORY

    text = stub_source.read_text()
    by_hand = set(re.findall(r"^STUB .*?(\w+)\(", text, re.M)) | set(re.findall(r"ACLOP\((acl\w+)\)", text))
    names = {n for n in wanted | looked_up if not n.startswith("_Z")} - by_hand
    aclnn = sorted({n.removesuffix("GetWorkspaceSize") for n in names if n.startswith("aclnn")})
    plain = sorted(n for n in names if not n.startswith("aclnn"))
    mangled = sorted(n for n in wanted if n.startswith("_Z"))
    readable = run("c++filt", stdin="\n".join(mangled))
    lines = [f"ACLNN({n})" for n in aclnn] + [c_stub(n) for n in plain]
    lines += [cpp_stub(s, r) for s, r in zip(mangled, readable)]
    (out / "generated.inc").write_text("\n".join(lines) + "\n")
    (out / "libraries.txt").write_text("\n".join(sorted(libraries)) + "\n")

    # MindSpore compares CANN's version with those that it supports: name the newest of them.
    check = (mindspore / "run_check/_check_version.py").read_text()
    versions = re.findall(r'self\.version = \[("[0-9.", ]+)\]', check.split("class AscendEnvChecker")[1])
    version = re.findall(r"[0-9.]+", versions[0])[-1] + ".0"
    (cann / "compiler/version.info").write_text(f"Version={version}\n")
    print(
        f"{len(aclnn)} aclnn kernels, {len(plain)} C and {len(mangled)} C++ functions, "
        f"{len(libraries)} library names, CANN {version}"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
