"""How a kernel is launched: on which device's tiles, tuned or chosen, and observed.

Every launch of the package goes through `run`. `observing` sees them all, and can stand in for a GPU that is not there:
the compile gate, the traffic count and the launch-count tests look at the same launches that a layer makes.

Triton's own way to a launch (tuner, heuristics, binding, specialisation) takes 130 us of Python, and a training step
makes fifteen: at CLIP's sizes more than the GPU works. So a launch that was made before is made again by the compiled
kernel that it came to (`Prepared`).
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .primitives import INTERPRETED
from .tiles import DESCRIPTOR_ARCHITECTURES, DESCRIPTORS, TUNING_KEYS, Tile, candidates

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
        needs = {"experts": self.args.get("N", 1), "activation": self.args.get("ACTIVATION")}
        return candidates(architecture, self.gemm, self.itemsize, self.args["PRECISION"], lengths, **needs)


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
    if INTERPRETED or _observation is not None or _chooser is not None:
        _run(kernel, grid, gemm, device, itemsize, args)
        return
    key = launch_key(kernel, gemm, device, args)
    with on_device(device):
        if (prepared := _prepared.get(key)) is not None:
            prepared.launch(grid, args)
            return
    compiled, sizes = _run(kernel, grid, gemm, device, itemsize, args)
    if len(_prepared) >= MOST_PREPARED:  # of a program whose sizes never come back
        _prepared.clear()
    _prepared[key] = Prepared(compiled=compiled, names=tuple(kernel.arg_names), gemm=gemm, sizes=sizes)


def _run(
    kernel: Any,
    grid: Callable[[dict], tuple] | tuple,
    gemm: str | None,
    device: torch.device,
    itemsize: int,
    args: dict[str, Any],
) -> tuple[Any, dict[str, int]]:
    """Triton's way. Returns the compiled kernel, and the sizes of the tile that was chosen for it."""
    launch = Launch(
        kernel=kernel, grid=grid if callable(grid) else lambda _: grid, args=args, gemm=gemm, itemsize=itemsize
    )
    if _observation is not None:
        _observation.seen(launch)
        if _observation.architecture is not None:
            return None, {}
    with on_device(device):
        if gemm is None:
            return kernel[grid](**args, **COMPILER_OPTIONS), {}
        tiles = launch.tiles(architecture(device))
        if _chooser is not None:
            tiles = (_chooser(gemm, tiles),)
        if INTERPRETED:
            sized = args | tiles[0].sizes
            return kernel[grid(sized)](**sized | fitted(sized, gemm)), {}
        tuned = _tuned(kernel, gemm, tiles)
        return tuned[grid](**args, **COMPILER_OPTIONS), tuned.best_config.kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Launches that were made before


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A compiled kernel, ready for arguments that agree in `launch_key`. names: of all its arguments, in order."""

    compiled: Any
    names: tuple[str, ...]
    gemm: str | None
    sizes: dict[str, int]

    def launch(self, grid: Callable[[dict], tuple] | tuple, args: dict[str, Any]) -> None:
        if self.gemm is not None:
            args |= self.sizes
            args |= fitted(args, self.gemm)
        shape = grid(args) if callable(grid) else grid
        self.compiled[shape + (1,) * (3 - len(shape))](*[args[name] for name in self.names])


MOST_PREPARED = 4096
_prepared: dict[tuple, Prepared] = {}


def launch_key(kernel: Any, gemm: str | None, device: torch.device, args: dict[str, Any]) -> tuple:
    """What a compiled kernel depends on, at least: what Triton specialises by, and a GEMM's tuner, whose keys are
    among its integers. Of a GEMM all integers count, of others those that are constants; of the rest, and of
    pointers, what decides how they are loaded and stored.
    """
    key = [kernel.fn, gemm, device.index, *args]  # a kernel itself is hashed by its source
    general = () if gemm is not None else runtime_names(kernel.fn)
    pointers = []
    for name, value in args.items():
        if isinstance(value, Tensor):
            key.append(value.dtype)
            pointers.append(value.data_ptr())
        elif name not in general or value is None:
            key.append(value)
        elif isinstance(value, float):
            key.append(float)
        else:
            key.append((value == 1, value % 16 == 0, value < 2**31))
    if functools.reduce(operator.or_, pointers, 0) % 16:
        key += [pointer % 16 == 0 for pointer in pointers]
    return tuple(key)


@functools.cache
def runtime_names(function: Callable) -> frozenset[str]:
    """The arguments of a kernel's function that are no constants to the compiler: they have no annotation."""
    return frozenset(inspect.signature(function).parameters) - inspect.get_annotations(function).keys()


# Triton's own are functions of its language, which take ten times as long.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, the tensors' GPU is the current one, where Triton launches: with device_map="auto" it often is not."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _tuned(kernel: Any, gemm: str, tiles: tuple[Tile, ...]):
    """The kernel behind triton's autotuner; its choice is cached on disk, per key, by triton."""
    configs = [triton.Config(tile.sizes, **tile.options) for tile in tiles]
    if gemm in DESCRIPTORS:
        # A heuristic, not a pre_hook of each config: with those, triton gives up its cache on disk.
        kernel = triton.heuristics(
            {name: functools.partial(operand, gemm=gemm, name=name) for name in DESCRIPTORS[gemm]}
        )(kernel)
    return triton.autotune(configs=configs, key=TUNING_KEYS[gemm], cache_results=True)(kernel)


def fitted(args: dict, gemm: str) -> dict:
    """A GEMM's operands that are read through descriptors, where they are: of the blocks which the tile reads."""
    if not args["DESCRIPTOR"]:
        return {}
    return {name: operand(args, gemm=gemm, name=name) for name in DESCRIPTORS[gemm]}


def operand(args: dict, *, gemm: str, name: str) -> Any:
    tensor = args[name]
    if not args["DESCRIPTOR"]:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    sides = DESCRIPTORS[gemm][name]
    if tensor.ndim == 3 and args["K_MAJOR"]:
        sides = sides[::-1]
    block = [1] * (tensor.ndim - 2) + [args[side] for side in sides]
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block)


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


def _weight_tiles(gemm: str, weight: Tensor, precision: str) -> tuple[Tile, ...]:
    """The candidates of a GEMM with a weight, before it is launched."""
    return candidates(architecture(weight.device), gemm, weight.element_size(), precision, weight.shape[1:])


class Shared(NamedTuple):
    """What the programs of a GEMM share its last round with (last_round.py). Both are empty memory."""

    slots: Tensor  # float32, a tile for each program
    flags: Tensor  # [a power of two, at least the programs] int32, which an earlier kernel lowers


def shared_round(precision: str, **weights: Tensor) -> Shared:
    """Enough for GEMMs, one after the other, whichever tiles they take. By name their weights [N, rows, columns]."""
    device = next(iter(weights.values())).device
    found = [tile for gemm, weight in weights.items() for tile in _weight_tiles(gemm, weight, precision)]
    floats = processors(device) * max(tile.programs * tile.BM * tile.BN for tile in found)
    flags = next_power_of_2(processors(device) * max(tile.programs for tile in found))
    return Shared(
        torch.empty(floats, dtype=torch.float32, device=device), torch.empty(flags, dtype=torch.int32, device=device)
    )


def descriptors_usable(device: torch.device, *operands: Tensor) -> bool:
    """Whether contiguous operands can be read through TMA: their rows start at multiples of 16 bytes."""
    if architecture(device) not in DESCRIPTOR_ARCHITECTURES:
        return False
    return all(
        w.shape[-1] * w.element_size() % 16 == 0 and w.storage_offset() * w.element_size() % 16 == 0 for w in operands
    )
