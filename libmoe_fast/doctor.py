"""`libmoe-fast doctor`: what is installed, what works here, and for what does not, why and what to do."""

import json as jsonlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import torch

from libmoe_fast import compatibility, extension, ops

# Distributions the package and its extras use; the optional ones may well be absent.
PACKAGES = (
    "libmoe_fast",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "safetensors",
    "transformers",
    "deepspeed",
    "jsonargparse",
    "lmms-eval",
    "filelock",
    "megablocks",
)


def collect() -> dict:
    """Everything the report shows, as plain values that JSON can hold."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: compatibility.installed_version(name) for name in PACKAGES},
        "known_problems": [{"problem": p.problem, "mend": p.mend} for p in compatibility.problems()],
        "extension": _extension(extension.load()),
        "cuda_extension": _extension(extension.load_cuda()),
        "backends": {
            name: {"usable": problem is None, "problem": problem} for name, problem in ops.available_backends().items()
        },
        "cuda": _cuda(),
        "build_tools": {"c++": _tool(os.environ.get("CXX", "g++")), "ninja": _tool("ninja"), "nvcc": _tool("nvcc")},
    }


def run(*, json: bool = False) -> int:
    """Prints the report, as a table or as JSON. Returns the exit status: 0 if some backend works here, else 1."""
    report = collect()
    print(jsonlib.dumps(report, indent=2) if json else "\n".join(_lines(report)))
    return 0 if any(backend["usable"] for backend in report["backends"].values()) else 1


def _extension(state: extension.ExtensionState) -> dict:
    return {
        "loaded": state.loaded,
        "path": state.path,
        "built_with_torch": state.built_with,
        "running_torch": torch.__version__,
        "abi": f"torch stable ABI, {'.'.join(map(str, extension.TORCH_FLOOR))} and newer",
        "reason": state.reason,
        "hint": state.hint,
    }


def _cuda() -> dict:
    available = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if available else []
    return {
        "available": available,
        "torch_built_for": torch.version.cuda or torch.version.hip,
        "devices": [
            {"name": d.name, "memory_gib": round(d.total_memory / 2**30, 1), "capability": f"{d.major}.{d.minor}"}
            for d in devices
        ],
    }


def _tool(command: str) -> dict | None:
    """Path and version of a command, or None where it is not on PATH."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"path": path, "version": None, "problem": str(error)}
    version = re.search(r"\d+\.\d+[\w.]*", shown.replace("release ", ""))
    return {"path": path, "version": version and version.group()}


def _lines(report: dict) -> Iterator[str]:
    yield f"libmoe_fast {report['packages']['libmoe_fast'] or '(not installed)'}"
    yield from _section("versions", {"python": report["python"], **report["packages"]}, absent="not installed")
    for known in report["known_problems"]:
        yield f"  !  {known['problem']}"
        yield f"     what to do: {known['mend']}"
    yield from _section("C++ extension", _extension_rows(report["extension"]))
    yield from _section("C++ extension, CUDA part", _extension_rows(report["cuda_extension"]))
    backends = {name: backend["problem"] or "usable" for name, backend in report["backends"].items()}
    yield from _section("backends", backends)
    yield from _section("devices", _device_rows(report))
    tools = {name: tool and f"{tool['version']} ({tool['path']})" for name, tool in report["build_tools"].items()}
    yield from _section("build tools", tools, absent="not found")


def _section(title: str, rows: dict, absent: str = "-") -> Iterator[str]:
    yield ""
    yield title
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        yield f"  {name:<{width}}  {absent if value is None else value}"


def _extension_rows(state: dict) -> dict:
    if state["loaded"]:
        return {
            "state": "loaded",
            "file": state["path"],
            "ABI": f"{state['abi']}; built with torch {state['built_with_torch']}, running {state['running_torch']}",
        }
    return {"state": "not loaded", "file": state["path"], "why": state["reason"], "what to do": state["hint"]}


def _device_rows(report: dict) -> dict:
    rows = {"CPU": f"{report['cpu_threads']} threads"}
    cuda = report["cuda"]
    for i, device in enumerate(cuda["devices"]):
        rows[f"GPU {i}"] = f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}"
    if not cuda["available"]:
        built_for = cuda["torch_built_for"]
        rows["GPU"] = f"none found (torch is built for {'CUDA ' + built_for if built_for else 'the CPU only'})"
    return rows
