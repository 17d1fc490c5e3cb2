"""What every kernel needs: dot, rounding, activations, and tiles over rows sorted by expert.

The Triton interpreter computes bf16 products and sums wrongly and truncates fp32 -> bf16, both without a word. So
every kernel multiplies through `dot`, stores through `cast`, and turns what it loads for anything else into float32.
"""

import os

import triton
import triton.language as tl

from .interpreter import replace_once_per_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
if INTERPRETED:
    replace_once_per_launch()

# A GEMM's `rows_log2` is there for the tuner, which chooses a tile by it, and PROGRAMS for its grid; the kernel is the
# same for all their values.
gemm_jit = triton.jit(do_not_specialize=["rows_log2"])


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION, one of tiles.PRECISIONS, matters for float32 operands only."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 -> dtype, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(value != value, bits, rounded)  # a NaN's payload must not carry into infinity
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return value.to(dtype)


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] -> its left and right half. An epilogue that works on one half at a time needs half the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def sigmoid(u, FAST: tl.constexpr):
    """1 / (1 + exp(-u)); FAST: in one special-function instruction of NVIDIA's instead of two, right to 2^-12."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * u], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    else:
        return tl.sigmoid(u)


GPT_OSS_LIMIT = tl.constexpr(7.0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(z) in float32. FAST: see sigmoid; for bfloat16, whose own rounding is four times coarser."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), FAST)
    elif ACTIVATION == "quick_gelu":
        return z * sigmoid(1.702 * z, FAST)
    elif ACTIVATION == "silu":
        return z * sigmoid(z, FAST)
    elif ACTIVATION == "gpt_oss":
        z = tl.minimum(z, GPT_OSS_LIMIT)
        return z * sigmoid(1.702 * z, FAST)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(z, 0.0)


@triton.jit
def gated_factor(up, ACTIVATION: tl.constexpr):
    """What act(gate) is multiplied by, in float32."""
    if ACTIVATION == "gpt_oss":
        return 1.0 + tl.minimum(tl.maximum(up, -GPT_OSS_LIMIT), GPT_OSS_LIMIT)
    else:
        return up


@triton.jit
def through_factor(gradient, up, ACTIVATION: tl.constexpr):
    """The gradient by up from that by gated_factor."""
    if ACTIVATION == "gpt_oss":
        return tl.where(tl.abs(up) > GPT_OSS_LIMIT, 0.0, gradient)
    else:
        return gradient


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act'(z) in float32."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_pytorch_tanh":
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), FAST)
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * z, FAST)
        return s + 1.702 * z * s * (1.0 - s)
    elif ACTIVATION == "silu":
        s = sigmoid(z, FAST)
        return s + z * s * (1.0 - s)
    elif ACTIVATION == "gpt_oss":
        s = sigmoid(1.702 * z, FAST)
        return tl.where(z > GPT_OSS_LIMIT, 0.0, s + z * s * (1.0 - s) * 1.702)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return (z > 0.0).to(tl.float32)


@triton.jit
def count_row_tiles(offsets_ptr, N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr):
    """How many tiles of BM rows all experts need; a tile never holds rows of two experts."""
    e = tl.arange(0, NP)
    start = tl.load(offsets_ptr + e, mask=e < N, other=0)
    stop = tl.load(offsets_ptr + e + 1, mask=e < N, other=0)
    return tl.sum((stop - start + BM - 1) // BM).to(tl.int32)


@triton.jit
def find_row_tile(tile, offsets_ptr, N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr):
    """Row tile number -> (expert, its first row, end of the expert's rows). O(N) vector work, no host table."""
    e = tl.arange(0, NP)
    start = tl.load(offsets_ptr + e, mask=e < N, other=0)  # int64
    stop = tl.load(offsets_ptr + e + 1, mask=e < N, other=0)
    tiles = ((stop - start + BM - 1) // BM).to(tl.int32)
    after = tl.cumsum(tiles, 0)  # tiles of experts 0..e
    expert = tl.sum((after <= tile).to(tl.int32))
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - (after - tiles)).to(tl.int64) * BM, 0))
    return expert, first, tl.sum(tl.where(mine, stop, 0))


@triton.jit
def swizzle(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile), in groups of GROUP row tiles: neighbours share operands in the L2."""
    per_group = GROUP * column_tiles
    group = tile // per_group
    rows_here = min(row_tiles - group * GROUP, GROUP)
    inside = tile % per_group
    return group * GROUP + inside % rows_here, inside // rows_here
