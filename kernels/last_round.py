"""The last round of a persistent GEMM, shared by all programs.

P programs take the tiles round by round, one each. The last round may leave a few tiles and most programs idle: 160
tiles on 132 multiprocessors take as long as 264. So each of the last round's tiles is cut into parts along its depth:

    split_last_round   tiles -> whole, parts, items   items 0..whole are tiles, the others parts of those that are left
    part_of_tile       item -> tile, part, parts      one program has one part, neighbours those of one tile
    finish             a whole tile is stored; a part goes to its program's slot and raises the slot's flag, but the
                       last part of a tile takes the others' flags, adds up the slots in their order, and stores

The order of all sums follows from the sizes, so the bits repeat. Only a later program waits for an earlier one, which
the device started before it: no program waits for one that has no place to run.
"""

import triton
import triton.language as tl

from .primitives import INTERPRETED, cast
from .products import columns

MOST_PARTS = tl.constexpr(4)  # writing and adding up a slot takes as long as a few steps of a product
LEAST_STEPS = tl.constexpr(1 if INTERPRETED else 4)  # of BK, in a part; tests have few


@triton.jit
def split_last_round(tiles, depth, BK: tl.constexpr):
    """How many tiles are taken whole, in how many parts each of the others, and how many items that makes."""
    programs = tl.num_programs(0)
    whole = tiles // programs * programs
    left = tiles - whole
    parts = min(programs // max(left, 1), min(tl.cdiv(depth, BK) // LEAST_STEPS, MOST_PARTS))
    parts = max(parts, 1)
    return whole, parts, whole + left * parts


@triton.jit
def part_of_tile(item, whole, parts):
    """item -> its tile, which part of it, and of how many."""
    split = item >= whole
    tile = tl.where(split, whole + (item - whole) // parts, item)
    return tile, tl.where(split, (item - whole) % parts, 0), tl.where(split, parts, 1)


@triton.jit
def part_of_depth(part, parts, depth, BK: tl.constexpr):
    """The part's range of the depth, in whole steps; the last may be short, or empty."""
    per = tl.cdiv(tl.cdiv(depth, BK), parts) * BK
    return part * per, min((part + 1) * per, depth)


@triton.jit
def lower(flags_ptr, FLAGS: tl.constexpr):
    """Lowers all flags, fresh memory, in a kernel before the one that raises them."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(flags_ptr + tl.arange(0, FLAGS), tl.zeros((FLAGS,), tl.int32))


@triton.jit
def finish(
    tile, out_ptr, row, live, column, COLUMNS, part, parts, slots_ptr, flags_ptr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Stores a tile [BM, BN], or what its parts come to, in out [rows, COLUMNS] from `column` on."""
    if parts == 1:
        # A whole tile in float32, as float16's da is, takes more registers than there are.
        WIDE: tl.constexpr = min(BN, 32) if out_ptr.dtype.element_ty == tl.float32 else BN
        pieces = columns(tile, BM, BN, WIDE)
        for i in tl.static_range(BN // WIDE):
            store_columns(pieces[i], out_ptr, row, live, column + i * WIDE + tl.arange(0, WIDE), COLUMNS)
    else:
        slot = tl.program_id(0)
        put(tile, slots_ptr + slot.to(tl.int64) * (BM * BN), BM, BN)
        if part < parts - 1:
            tl.atomic_xchg(flags_ptr + slot, 1, sem="release")
        else:
            first = slot - part
            take_flags(flags_ptr, first, slot)
            add_slots(slots_ptr + first.to(tl.int64) * (BM * BN), out_ptr, row, live, column, COLUMNS, parts, BM, BN)


@triton.jit
def put(tile, slot_ptr, BM: tl.constexpr, BN: tl.constexpr):
    tl.store(slot_ptr + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], tile)
    tl.debug_barrier()  # all threads' stores come before what follows


@triton.jit
def take_flags(flags_ptr, first, stop):
    """Waits for flags and lowers them: a launch leaves them as it found them, however often the tuner repeats it."""
    for other in range(first, stop):
        while tl.atomic_cas(flags_ptr + other, 1, 0, sem="acquire") != 1:
            pass


@triton.jit
def add_slots(
    slots_ptr, out_ptr, row, live, column, COLUMNS, parts, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    # The tile itself is in its slot now, so its registers are free: many loads are on their way at once.
    WIDE: tl.constexpr = min(BN, 64)
    for i in tl.static_range(BN // WIDE):
        n = i * WIDE + tl.arange(0, WIDE)
        total = tl.zeros((BM, WIDE), tl.float32)
        for part in range(parts):
            at = slots_ptr + part * (BM * BN) + row[:, None] * BN + n[None, :]
            total += tl.load(at, cache_modifier=".cg")  # from the L2: the L1 may hold what was there before
        store_columns(total, out_ptr, row, live, column + n, COLUMNS)


@triton.jit
def store_columns(tile, out_ptr, row, live, column, COLUMNS):
    """Rounds a tile [BM, ..] into out [rows, COLUMNS]."""
    mask = live[:, None] & (column[None, :] < COLUMNS)
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], cast(tile, out_ptr.dtype.element_ty), mask=mask)
