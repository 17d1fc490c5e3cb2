"""Tile sizes: one small table per architecture. The compile gate (aot.py) checks every row of it.

Tile rows are for 2-byte dtypes; 4-byte ones halve BK, which keeps the bytes in shared memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BM rows (tokens, or weight rows in weight_grad) x BN columns, BK deep; GROUP row tiles share the L2."""

    BM: int
    BN: int
    BK: int
    GROUP: int = 8
    warps: int = 8
    stages: int = 3

    def meta(self, itemsize: int) -> dict[str, int]:
        """The kernel's compile-time sizes for operands of `itemsize` bytes."""
        depth = self.BK if itemsize <= 2 else self.BK // 2
        return {"BM": self.BM, "BN": self.BN, "BK": depth, "GROUP": self.GROUP}


GEMMS = ("up", "up_gated", "down", "dz", "dz_gated", "dx", "weight_grad")

# Candidates, best guess first. All dz candidates of a row share BN: the parts of dw are laid out by it.
_WIDE = Tile(BM=128, BN=256, BK=64, stages=3)
_SQUARE = Tile(BM=128, BN=128, BK=64, stages=3)
_SMALL = Tile(BM=64, BN=128, BK=64, warps=4, stages=3)
_NARROW = Tile(BM=128, BN=64, BK=64, stages=3)
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm80": {
        **dict.fromkeys(GEMMS, (_SQUARE, _SMALL)),
        "weight_grad": (Tile(BM=128, BN=128, BK=32, stages=4), Tile(BM=64, BN=128, BK=32, warps=4, stages=4)),
    },
    # A gated up holds two accumulators, dz an epilogue's worth of registers: no wide tiles for them.
    "sm90": {
        **dict.fromkeys(GEMMS, (_WIDE, _SQUARE, _SMALL)),
        "up_gated": (_SQUARE, _SMALL),
        "dz": (_SQUARE, _SMALL),
        "dz_gated": (_SQUARE, _SMALL),
        "weight_grad": (_WIDE, _SQUARE),
    },
    # Accumulators come out of tensor memory whole, so an epilogue costs more registers than on sm90.
    "sm100": {
        **dict.fromkeys(GEMMS, (_SQUARE, _SMALL)),
        "up_gated": (_SQUARE,),
        "dz_gated": (_NARROW,),
        "dx": (_WIDE, _SQUARE, _SMALL),
        "weight_grad": (_WIDE, _SQUARE),
    },
    # 64 KiB of shared memory; two stages are one buffer there.
    "gfx942": {
        **dict.fromkeys(GEMMS, (Tile(BM=128, BN=128, BK=64, stages=2), Tile(BM=64, BN=128, BK=64, stages=2))),
        "dz_gated": (Tile(BM=64, BN=128, BK=64, stages=2),),
    },
    # Its cost is the number of programs and steps, whatever their size.
    "interpreter": dict.fromkeys(GEMMS, (Tile(BM=64, BN=64, BK=64, GROUP=2),)),
}
DESCRIPTOR_ARCHITECTURES = ("sm90", "sm100")  # on sm80, descriptor code is emulated and spills

# The weight that a kernel may read through a descriptor, and the sides of the block it reads: A W^T, or A W.
WEIGHTS = {
    "up": ("w1", ("BN", "BK")),
    "up_gated": ("w1", ("BN", "BK")),
    "down": ("w2", ("BN", "BK")),
    "dz": ("w2", ("BK", "BN")),
    "dz_gated": ("w2", ("BK", "BN")),
    "dx": ("w1", ("BK", "BN")),
}

# What a tuned choice depends on: the arguments of the kernel that fix its work per row, and about how many rows it has.
TUNING_KEYS = {
    "up": ["D", "H", "N", "K", "rows_log2"],
    "up_gated": ["D", "H", "N", "K", "rows_log2"],
    "down": ["H", "O", "N", "rows_log2"],
    "dz": ["H", "O", "N", "K", "rows_log2"],
    "dz_gated": ["H", "O", "N", "K", "rows_log2"],
    "dx": ["D", "H1", "N", "rows_log2"],
    "weight_grad": ["M", "C", "rows_log2"],
}
