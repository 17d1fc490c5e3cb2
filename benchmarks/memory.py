"""Memory: what autograd keeps for backward, and the most that a run holds at a time."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from libmoe_fast.benchmarks.arena import build_arena
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.measure import Entrant

SELF = Path("/proc/self")
SLOW_TO_IMPORT = ["libmoe_fast.benchmarks.memory", "transformers.integrations.moe", "st_moe_pytorch"]


def saved_bytes(entrant: Entrant) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, without those of `entrant.held`."""
    held = {t.untyped_storage().data_ptr() for t in entrant.held}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    entrant.reset()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entrant.run()
    entrant.reset()
    return sum(saved.values())


def peak_bytes(case: Case, names: Iterable[str], device: torch.device) -> dict[str, int]:
    """The most memory that a run of each entrant in `names` holds at a time beyond what was there before the first.

    Gradients count, parameters, input and gradient of the output do not. On a GPU it is what torch's allocator has
    handed out. On the CPU no allocator sees everything, so it is resident memory, see `resident_peak`; empty where the
    system does not tell it, which only Linux does.
    """
    if device.type == "cuda":
        return _peaks_on_gpu(case, names)
    return _peaks_on_cpu(case, list(names)) if SELF.exists() else {}


def _peaks_on_gpu(case: Case, names: Iterable[str]) -> dict[str, int]:
    arena, peaks = build_arena(case, torch.device("cuda")), {}
    for name in names:
        entrant = arena.entrants[name]
        entrant.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        entrant.run()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        entrant.reset()
    return peaks


# ---------------------------------------------------------------------------------------------------------------------
# Resident memory on the CPU


def resident_peak(entrant: Entrant) -> int:
    """The most memory that the process holds while `entrant` runs, beyond what it held before the first of two runs.

    Whoever asked for it: torch, oneDNN's scratch, the blocks that our C++ engine keeps for the next call (at most
    LIBMOE_FAST_CPU_CACHE_MB) and those that malloc does not give back. The second run counts, since training goes on
    with what the first one kept. Files do not count: they are code that the first run is the first to touch.
    """
    entrant.reset()
    ctypes.CDLL(None).malloc_trim(0)  # else the run is given, unseen, what building it left over
    before = _status("RssAnon") + _status("RssShmem")
    entrant.run()
    entrant.reset()
    (SELF / "clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    entrant.run()
    after = _status("VmHWM") - _status("RssFile")
    entrant.reset()
    return max(after - before, 0)


def _status(field: str) -> int:
    """Bytes, by a field of /proc/self/status."""
    lines = (SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peaks_on_cpu(case: Case, names: list[str]) -> dict[str, int]:
    """Each entrant in a process of its own, in which nothing ran before: what others left would hide what it needs."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SLOW_TO_IMPORT)
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(_in_forks, case, names, torch.get_num_threads()).result()


def _in_forks(case: Case, names: list[str], threads: int) -> dict[str, int]:
    """Builds the case once, and forks for each entrant."""
    torch.set_num_threads(1)  # a fork does not inherit OpenMP's threads, and would wait for them
    arena = build_arena(case, torch.device("cpu"))
    fork = multiprocessing.get_context("fork")
    peaks = {}
    for name in names:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_send_peak, args=(arena.entrants[name], threads, sender))
        process.start()
        sender.close()  # so that the end of that process is the end of the pipe
        try:
            peaks[name] = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{case.id}: {name} ended with exit code {process.exitcode} in its memory run") from None
        process.join()
    return peaks


def _send_peak(entrant: Entrant, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    sender.send(resident_peak(entrant))
