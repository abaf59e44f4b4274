"""Stand-ins for the Edge TPU's compiler and its library, for tests.

The compiler is a program that speaks edgetpu_compiler's command line and writes what it writes.

`STAND_IN_MODE` in the environment says how it goes: ``mapped``, ``partly`` (the last operator stays
on the processor), ``unmapped``, ``refused`` (status 0, no file, as the real one), ``slow``. The library is
edgetpu_delegate.c; with `STAND_IN_NO_DEVICE` in the environment no device answers, and with `STAND_IN_STICKS` those
answer that are files of that directory (``usb:0``, ``usb:1``), each to one process. With `STAND_IN_FOREIGN` it crashes
where a library does that was built for another runtime: when it takes an operator.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

_PROGRAM = '''#!{python}
import argparse, collections, os, pathlib, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("-s", "--show_operations", action="store_true")
parser.add_argument("-t", "--timeout_sec", type=int, default=180)
parser.add_argument("-o", "--out_dir", type=pathlib.Path, default=pathlib.Path("."))
parser.add_argument("model", type=pathlib.Path)
options = parser.parse_args()
mode = os.environ.get("STAND_IN_MODE", "mapped")
print("Edge TPU Compiler version 16.0.384591198")
print(f"Started a compilation timeout timer of {{options.timeout_sec}} seconds.", flush=True)
if mode == "slow":
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(os.environ["STAND_IN_PID"]).write_text(str(child.pid))
    time.sleep(600)
if mode == "refused":
    print("Invalid model: model.tflite\\nModel not quantized")
    print("Compilation child process completed within timeout period.\\nCompilation failed! ")
    sys.exit(0)
import numpy as np
from ai_edge_litert import schema_py_generated as schema
import flatbuffers
data = options.model.read_bytes()
model = schema.ModelT.InitFromPackedBuf(data, 0)
graph = model.subgraphs[0]
kinds = {{v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}}
names = [kinds[model.operatorCodes[o.opcodeIndex].builtinCode] for o in graph.operators]
n_cpu = {{"mapped": 0, "partly": 1, "unmapped": len(names)}}[mode]
n_tpu = len(names) - n_cpu
if n_tpu:
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = "edgetpu-custom-op", 1
    model.operatorCodes.append(code)
    entry = schema.OperatorT()
    entry.opcodeIndex = len(model.operatorCodes) - 1
    entry.inputs, entry.outputs = graph.inputs, graph.operators[n_tpu - 1].outputs
    if not n_cpu:
        entry.customOptions = np.frombuffer(data, np.uint8)
    graph.operators = [entry, *graph.operators[n_tpu:]]
builder = flatbuffers.Builder(len(data) + 2**16)
builder.Finish(model.Pack(builder), b"TFL3")
output = options.out_dir / (options.model.stem + "_edgetpu.tflite")
output.write_bytes(bytes(builder.Output()))
rows = collections.Counter((n, "Mapped to Edge TPU" if i < n_tpu else
    "More than one subgraph is not supported") for i, n in enumerate(names))
table = "Operator                       Count      Status\\n\\n" + "".join(
    f"{{name:<31}}{{count:<11}}{{status}}\\n" for (name, status), count in rows.items())
used = sum(len(b.data) for b in model.buffers if b.data is not None)
print(f"""
Model compiled successfully in 98 ms.

Input model: {{options.model}}
Input size: {{len(data) / 1024:.2f}}KiB
Output model: {{output}}
Output size: {{output.stat().st_size / 1024:.2f}}KiB
On-chip memory used for caching model parameters: {{used / 1024:.2f}}KiB
On-chip memory remaining for caching model parameters: {{7.7 - used / 2**20:.2f}}MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: {{int(n_tpu > 0)}}
Total number of operations: {{len(names)}}
Operation log: {{output.with_suffix(".log")}}
""")
if n_cpu:
    print(f"Number of operations that will run on Edge TPU: {{n_tpu}}\\n"
          f"Number of operations that will run on CPU: {{n_cpu}}\\n")
output.with_suffix(".log").write_text(table)
if options.show_operations:
    print(table)
print("Compilation child process completed within timeout period.\\nCompilation succeeded! ")
sys.exit(1)  # nobody may look at it
'''


def write_stand_in(directory: Path, python: str = sys.executable) -> Path:
    """Put the program into a directory, which is then one for PATH; `python` runs it."""
    path = directory / "edgetpu_compiler"
    path.write_text(_PROGRAM.format(python=python), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def build_library(directory: Path) -> Path | None:
    """Compile libedgetpu.so.1 into a directory, for LD_LIBRARY_PATH; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    path = directory / "libedgetpu.so.1"
    source = Path(__file__).with_name("edgetpu_delegate.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(source)], check=True)
    return path
