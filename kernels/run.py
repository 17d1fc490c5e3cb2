"""How a kernel is launched: on which device's tiles, tuned or chosen, and observed.

Every launch of the package goes through `run`. `observing` sees them all, and can stand in for a GPU that is not there:
the compile gate, the traffic count and the launch-count tests look at the same launches that a layer makes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .primitives import INTERPRETED
from .tiles import DESCRIPTOR_ARCHITECTURES, TUNING_KEYS, WEIGHTS, Tile, candidates

# Said at every compilation: what Triton does by default changes between 3.8 and 3.10.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
INTERPRETER_PROGRAMS = 3  # fewer than tiles, so that the persistent loop is exercised


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch. gemm: the name of a GEMM in the table of tiles; without one, sizes and warps are in args."""

    kernel: Any
    grid: Callable[[dict], tuple]
    args: dict[str, Any]
    gemm: str | None = None
    itemsize: int = 0

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    def tiles(self, architecture: str) -> tuple[Tile, ...]:
        """The candidates of a GEMM there, best guess first."""
        lengths = [self.args[name] for name in ("D", "H", "H1", "O", "M", "C") if name in self.args]
        experts = self.args.get("N", 1)
        return candidates(architecture, self.gemm, self.itemsize, self.args["PRECISION"], lengths, experts)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What `observing` is doing. architecture: pretend to run there, launching nothing; None really launches."""

    seen: Callable[[Launch], None]
    architecture: str | None = None
    programs: int = 0


_observation: Observation | None = None


@contextlib.contextmanager
def observing(
    seen: Callable[[Launch], None], *, architecture: str | None = None, programs: int = 132
) -> Iterator[None]:
    """Inside, `seen` is called with every launch. With an architecture, as if on such a device, and nothing runs."""
    global _observation
    before, _observation = _observation, Observation(seen=seen, architecture=architecture, programs=programs)
    try:
        yield
    finally:
        _observation = before


Chooser = Callable[[str, tuple[Tile, ...]], Tile]
_chooser: Chooser | None = None


@contextlib.contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Inside, `chooser(gemm, its candidates)` names the tile of every GEMM, not the tuner: to test or time each."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def run(
    kernel: Any,
    grid: Callable[[dict], tuple] | tuple,
    gemm: str | None = None,
    *,
    device: torch.device,
    itemsize: int = 0,
    **args,
) -> None:
    """Launches a kernel; a GEMM with the tuned tile of its candidates, on the grid that the tile asks for."""
    launch = Launch(
        kernel=kernel, grid=grid if callable(grid) else lambda _: grid, args=args, gemm=gemm, itemsize=itemsize
    )
    if _observation is not None:
        _observation.seen(launch)
        if _observation.architecture is not None:
            return
    with on_device(device):
        if gemm is None:
            kernel[grid](**args, **COMPILER_OPTIONS)
            return
        tiles = launch.tiles(architecture(device))
        if _chooser is not None:
            tiles = (_chooser(gemm, tiles),)
        if INTERPRETED:
            sized = args | tiles[0].sizes
            kernel[grid(sized)](**sized | fitted(sized, gemm))
        else:
            _tuned(kernel, gemm, tiles)[grid](**args, **COMPILER_OPTIONS)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, the tensors' GPU is the current one, where Triton launches: with device_map="auto" it often is not."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _tuned(kernel: Any, gemm: str, tiles: tuple[Tile, ...]):
    """The kernel behind triton's autotuner; its choice is cached on disk, per key, by triton."""
    configs = [triton.Config(tile.sizes, **tile.options) for tile in tiles]
    if gemm in WEIGHTS:
        # A heuristic, not a pre_hook of each config: with those, triton gives up its cache on disk.
        argument, _ = WEIGHTS[gemm]
        kernel = triton.heuristics({argument: lambda args: fitted(args, gemm)[argument]})(kernel)
    return triton.autotune(configs=configs, key=TUNING_KEYS[gemm], cache_results=True)(kernel)


def fitted(args: dict, gemm: str) -> dict:
    """The weight among a GEMM's sized arguments; a descriptor gets the block that the tile reads."""
    if gemm not in WEIGHTS:
        return {}
    argument, sides = WEIGHTS[gemm]
    operand = args[argument]
    if not isinstance(operand, Tensor):
        operand = replace(operand, block_shape=[1, *(args[side] for side in sides)])
    return {argument: operand}


def architecture(device: torch.device) -> str:
    """The row of TILES for a device; the nearest older one for an architecture without its own."""
    if _observation is not None and _observation.architecture is not None:
        return _observation.architecture
    return "interpreter" if INTERPRETED else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm100" if major >= 10 else "sm90" if major == 9 else "sm80"


def processors(device: torch.device) -> int:
    if _observation is not None and _observation.architecture is not None:
        return _observation.programs
    return INTERPRETER_PROGRAMS if INTERPRETED else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_columns(gemm: str, weight: Tensor, precision: str) -> int:
    """BN of a GEMM with a weight [N, rows, columns], whose candidates all share it."""
    found = candidates(architecture(weight.device), gemm, weight.element_size(), precision, weight.shape[1:])
    return found[0].BN


def descriptors_usable(device: torch.device, *weights: Tensor) -> bool:
    """Whether weights [N, rows, columns] can be read through TMA: rows start at multiples of 16 bytes."""
    if architecture(device) not in DESCRIPTOR_ARCHITECTURES:
        return False
    return all(
        w.shape[2] * w.element_size() % 16 == 0 and w.storage_offset() * w.element_size() % 16 == 0 for w in weights
    )


def weight_operand(weight: Tensor, descriptor: bool):
    """What a GEMM kernel takes as its weight: the tensor, or a descriptor whose block the launch fits to the tile."""
    if not descriptor:
        return weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, [1, 16, 16])
