"""The race lint on compiled code: it finds a planted race, and nothing where each use has a buffer of its own.

Compiles for sm90, which needs no GPU, but a process without TRITON_INTERPRET.
"""

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from libmoe_fast.kernels.primitives import INTERPRETED
from libmoe_fast.kernels.race import races

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: interpreted kernels cannot be compiled")


@triton.jit
def column_sums_kernel(a_ptr, b_ptr, c_ptr, sums_ptr, R, AGAIN: tl.constexpr, B: tl.constexpr):
    """C [B, B] = A^T B over R rows, and sums of A's columns: of the value that feeds the product, or loaded AGAIN."""
    column = tl.arange(0, B)
    c = tl.zeros((B, B), tl.float32)
    sums = tl.zeros((B,), tl.float32)
    for r0 in range(0, R, 64):
        at = (r0 + tl.arange(0, 64))[:, None] * B + column[None, :]
        a = tl.load(a_ptr + at)
        c = tl.dot(tl.trans(a), tl.load(b_ptr + at), c)
        if tl.program_id(0) == 0:
            terms = tl.load(a_ptr + at) if AGAIN else a
            sums += tl.sum(terms.to(tl.float32), 0)
    tl.store(c_ptr + column[:, None] * B + column[None, :], c)
    tl.store(sums_ptr + column, sums)


@triton.jit
def two_products_kernel(a_ptr, b_ptr, c_ptr, sums_ptr, R, AGAIN: tl.constexpr, B: tl.constexpr):
    """C [B, B] = A^T B, then B^T A added to it: two loops, in whose bodies the compiler uses the same names."""
    column = tl.arange(0, B)
    c = tl.zeros((B, B), tl.float32)
    for r0 in range(0, R, 64):
        at = (r0 + tl.arange(0, 64))[:, None] * B + column[None, :]
        c = tl.dot(tl.trans(tl.load(a_ptr + at)), tl.load(b_ptr + at), c)
    for r0 in range(0, R, 64):
        at = (r0 + tl.arange(0, 64))[:, None] * B + column[None, :]
        c = tl.dot(tl.trans(tl.load(b_ptr + at)), tl.load(a_ptr + at), c)
    tl.store(c_ptr + column[:, None] * B + column[None, :], c)


def ttgir(kernel=column_sums_kernel, *, again: bool = False) -> str:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            **dict.fromkeys(("a_ptr", "b_ptr"), "*bf16"),
            **dict.fromkeys(("c_ptr", "sums_ptr"), "*fp32"),
            "R": "i32",
            **dict.fromkeys(("AGAIN", "B"), "constexpr"),
        },
        constexprs={(names.index("AGAIN"),): again, (names.index("B"),): 128},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3}).asm["ttgir"]


def test_a_planted_race_is_found():
    (buffer,) = races(ttgir(again=False))
    assert buffer.startswith("%")


def test_two_buffers_are_no_race():
    code = ttgir(again=True)
    assert "isAsync = true" in code  # there is something that a copy could overtake
    assert races(code) == []


def test_names_belong_to_their_loop():
    """The buffers of one loop are not taken for those of the next, whose values have the same names."""
    code = ttgir(two_products_kernel)
    assert code.count("isAsync = true") == 2
    assert races(code) == []
