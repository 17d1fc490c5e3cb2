"""Tile sizes: one small table per architecture and kind of operand. The compile gate (aot.py) checks every row of it.

16-bit    bfloat16, float16
tf32      float32 cut to 10 bits on tensor cores, where the user allowed it
tf32x3    float32 as three such products, which keep nearly all of its bits: the default on NVIDIA
ieee      float32 as it is, where torch is told so: no tensor cores on NVIDIA, so small tiles, whose operands all lie in
          registers
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

PRECISIONS = ("ieee", "tf32x3", "tf32")  # of float32 operands, by falling accuracy


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BM rows (in dw1 and dw2 the gradient's) x BN columns, BK deep; GROUP row tiles share the L2.

    programs: of a persistent kernel, per multiprocessor; with two, one's epilogue runs beside the other's products.
    experts: for at most so many; with more, the search for a tile's expert takes registers that it needs itself.
    erf: whether those suffice for the error function, which "gelu" is.
    """

    BM: int
    BN: int
    BK: int
    GROUP: int = 8
    warps: int = 8
    stages: int = 3
    programs: int = 1
    experts: int | None = None
    erf: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """What the kernel is compiled for, by the names of its parameters."""
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK, "GROUP": self.GROUP, "PROGRAMS": self.programs}

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def name(self) -> str:
        twice = f" x{self.programs}" if self.programs > 1 else ""
        return f"{self.BM}x{self.BN}x{self.BK} w{self.warps} s{self.stages}{twice}"


GEMMS = ("up", "up_gated", "down", "da", "dx", "dw1", "dw2")

# Candidates, best guess first.
_WIDE = Tile(BM=128, BN=256, BK=64, stages=3)
_SQUARE = Tile(BM=128, BN=128, BK=64, stages=3)
_SMALL = Tile(BM=64, BN=128, BK=64, warps=4, stages=3)
_NARROW = Tile(BM=128, BN=64, BK=64, stages=3)
# The same bytes in shared memory as with 16 bits.
_SQUARE_32 = Tile(BM=128, BN=128, BK=32, stages=3)
_SMALL_32 = Tile(BM=64, BN=128, BK=32, warps=4, stages=3)
_NARROW_32 = Tile(BM=128, BN=64, BK=32, stages=3)
_TF32X3 = dict.fromkeys(GEMMS, (_NARROW_32,))  # operands in two halves each: registers for no wider one
_IEEE = dict.fromkeys(GEMMS, (Tile(BM=64, BN=64, BK=16, stages=3),))
# The largest tile of which two fit a multiprocessor, without spilling, under every Triton tried.
_SMALL_TWICE = replace(_SMALL, programs=2)

Row = dict[str, tuple[Tile, ...]]
TILES: dict[str, dict[str, Row]] = {
    "sm80": {
        "16-bit": {
            **dict.fromkeys(GEMMS, (_SQUARE, _SMALL)),
            "up_gated": (_NARROW,),
            **dict.fromkeys(
                ("dw1", "dw2"),
                (Tile(BM=128, BN=128, BK=32, stages=4), Tile(BM=64, BN=128, BK=32, warps=4, stages=4)),
            ),
        },
        "tf32": {
            **dict.fromkeys(GEMMS, (_SQUARE_32, _SMALL_32)),
            "up_gated": (_NARROW_32,),
            "dw1": (_SQUARE_32,),
            "dw2": (_SQUARE_32,),
        },
        "tf32x3": {**_TF32X3, "up_gated": (Tile(BM=64, BN=64, BK=16, stages=2),)},
        "ieee": _IEEE,
    },
    # A gated up holds two accumulators at once: no wide tiles for it.
    "sm90": {
        "16-bit": {
            "up": (replace(_WIDE, erf=False), _SQUARE, _SMALL_TWICE),
            "up_gated": (_SQUARE, _SMALL_TWICE),
            **dict.fromkeys(("down", "da", "dx"), (replace(_WIDE, experts=128), _SQUARE, _SMALL_TWICE)),
            **dict.fromkeys(("dw1", "dw2"), (_WIDE, replace(_SQUARE, warps=4))),
        },
        "tf32": dict.fromkeys(("up", "up_gated", "down", "da", "dx"), (_SQUARE_32, _SMALL_32)),  # dW: as tf32x3
        "tf32x3": _TF32X3,
        "ieee": _IEEE,
    },
    # Accumulators come out of tensor memory whole, so an epilogue costs more registers than on sm90.
    "sm100": {
        "16-bit": {
            **dict.fromkeys(GEMMS, (_SQUARE, _SMALL)),
            "da": (_SQUARE, replace(_SMALL, experts=128)),
            "up": (_SQUARE,),
            "up_gated": (_SQUARE,),
            "dw1": (_WIDE, _SQUARE),
            "dw2": (_WIDE, _SQUARE),
        },
        "tf32": {
            **dict.fromkeys(GEMMS, (_SQUARE_32, _SMALL_32)),
            "up": (Tile(BM=64, BN=64, BK=32, stages=2),),
            "up_gated": (_NARROW_32,),
            "down": (_NARROW_32,),
            "da": (_SMALL_32,),
            "dx": (_NARROW_32,),
            "dw1": (_SMALL_32,),
            "dw2": (_SMALL_32,),
        },
        "tf32x3": _TF32X3,
        "ieee": _IEEE | dict.fromkeys(("da", "dx", "dw1", "dw2"), (Tile(BM=64, BN=64, BK=16, stages=2),)),
    },
    # 64 KiB of shared memory; two stages are one buffer there. Its matrix units take float32 as it is.
    "gfx942": {
        "16-bit": dict.fromkeys(GEMMS, (Tile(BM=128, BN=128, BK=64, stages=2), Tile(BM=64, BN=128, BK=64, stages=2))),
        "tf32": dict.fromkeys(GEMMS, (Tile(BM=128, BN=64, BK=32, stages=2),)),
        "ieee": dict.fromkeys(GEMMS, (Tile(BM=128, BN=64, BK=32, stages=2), Tile(BM=64, BN=64, BK=16, stages=2))),
    },
}
# Where a row is no multiple of 16 long, the compiler cannot tell that neighbours may be loaded at once: each element
# is loaded by itself, without asynchronous copies, and that takes registers.
_ODD = dict.fromkeys(GEMMS, Tile(BM=64, BN=64, BK=32, stages=2))
_ODD_16 = dict.fromkeys(GEMMS, Tile(BM=64, BN=64, BK=16, stages=2))
_ODD_IEEE = dict.fromkeys(GEMMS, Tile(BM=64, BN=32, BK=16, stages=2))
ODD_TILES: dict[str, dict[str, dict[str, Tile]]] = {
    "sm80": dict.fromkeys(("16-bit", *PRECISIONS), _ODD_16),
    "sm90": {
        "16-bit": _ODD,
        "tf32": _ODD,
        "tf32x3": _ODD_16,
        "ieee": _ODD_IEEE | dict.fromkeys(("dw1", "dw2"), Tile(BM=32, BN=32, BK=16, stages=2)),
    },
    "sm100": {
        "16-bit": _ODD | {"dx": _ODD_16["dx"]},
        "tf32": _ODD,
        "tf32x3": _ODD | {"dx": _ODD_16["dx"]},
        "ieee": _ODD_IEEE,
    },
    "gfx942": dict.fromkeys(("16-bit", *PRECISIONS), _ODD),
}
# Its cost is the number of programs and steps, whatever their size.
INTERPRETER_TILE = Tile(BM=64, BN=64, BK=64, GROUP=2)
DESCRIPTOR_ARCHITECTURES = ("sm90", "sm100")  # on sm80, descriptor code is emulated and spills


def candidates(
    architecture: str,
    gemm: str,
    itemsize: int,
    precision: str,
    lengths: Iterable[int],
    experts: int = 1,
    activation: str | None = None,
) -> tuple[Tile, ...]:
    """The tiles that a GEMM may take on an architecture, best guess first.

    itemsize, precision: of its operands, in bytes and as in PRECISIONS; lengths: of the rows that it reads and writes.
    """
    if architecture == "interpreter":
        return (INTERPRETER_TILE,)
    kind = "16-bit" if itemsize == 2 else precision
    if any(length % 16 for length in lengths):
        return (ODD_TILES[architecture][kind][gemm],)
    return tuple(
        tile
        for tile in TILES[architecture][kind][gemm]
        if (tile.experts is None or experts <= tile.experts) and (tile.erf or activation != "gelu")
    )


# The operands that a kernel reads through descriptors where DESCRIPTOR, and the sides of the blocks it reads: of a
# weight, the other way round where K_MAJOR.
DESCRIPTORS = {
    "up": {"w1": ("BK", "BN")},
    "up_gated": {"w1": ("BK", "BN")},
    "down": {"a": ("BM", "BK"), "w2": ("BK", "BN")},
    "da": {"rows": ("BM", "BK"), "w": ("BK", "BN")},
    "dx": {"rows": ("BM", "BK"), "w": ("BK", "BN")},
    "dw1": {"left": ("BK", "BM"), "right": ("BK", "BN")},
    "dw2": {"left": ("BK", "BM"), "right": ("BK", "BN")},
}

# What a tuned choice depends on: the arguments of the kernel that fix its work per row, and about how many rows it has.
TUNING_KEYS = {
    "up": ["D", "H", "N", "K", "rows_log2"],
    "up_gated": ["D", "H", "N", "K", "rows_log2"],
    "down": ["H", "O", "N", "rows_log2"],
    "da": ["M", "C", "N", "rows_log2"],
    "dx": ["M", "C", "N", "rows_log2"],
    "dw1": ["M", "C", "rows_log2"],
    "dw2": ["M", "C", "rows_log2"],
}
