"""The experts, forward and backward, on plain tensors.

    experts           up, down, combine                       3 launches
    experts_backward  dy sorted, da, dz, dW2, x sorted, dW1, dxs    7, without gradients of weights 4

Forward keeps x, the pre-activation z and the permutation; backward runs no forward GEMM again (see dz_kernel).
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from libmoe_fast.errors import ConfigError

from .combine import combine_kernel, expand_kernel
from .dispatch import Permuted
from .dz import DZ_COLUMNS, DZ_ROWS, dz_kernel
from .grouped_gemm import back_kernel, down_kernel, up_kernel
from .primitives import INTERPRETED
from .run import architecture, cdiv, descriptors_usable, next_power_of_2, processors, run, shared_round
from .tiles import PRECISIONS
from .weight_grad import DB_COLUMNS, weight_grad_kernel

FP32_VARIABLE = "LIBMOE_FAST_FP32"
ROWS_WORTH_A_COPY = 64  # of each expert: with fewer, a product takes about as long as to read its weight


class ExpertWeights(NamedTuple):
    """Stacked weights and how to apply them."""

    w1: Tensor  # [N, H, D], gated [N, 2H, D]
    b1: Tensor | None  # [N, H or 2H]
    w2: Tensor  # [N, O, H]
    b2: Tensor | None  # [N, O]
    activation: str
    gated: bool


def experts(
    x: Tensor, weights: Tensor, permuted: Permuted, expert: ExpertWeights, *, store_z: bool
) -> tuple[Tensor, Tensor | None]:
    """x [T, D], weights [T, K] float32 -> y [T, O], and z [T*K, H or 2H] if it is to be kept for backward. T > 0."""
    D, K, (N, O, H) = x.shape[1], weights.shape[1], expert.w2.shape
    rows, device = permuted.order.shape[0], x.device
    z = x.new_empty(rows, expert.w1.shape[1]) if store_z else None
    a = x.new_empty(rows, H)
    ys = (x.new_zeros if has_free_choices(permuted, N) else x.new_empty)(rows, O)
    shared = gemm_arguments(x, permuted, N)
    last_round = shared_round(shared["PRECISION"], down=expert.w2)
    w1, w1_k_major = laid_out(expert.w1, rows, shared["PRECISION"], k_major=True)
    run(
        up_kernel,
        persistent(rows, N, H, device),
        "up_gated" if expert.gated else "up",
        x_ptr=x,
        w1=w1,
        b1_ptr=expert.b1,
        order_ptr=permuted.order,
        z_ptr=z,
        a_ptr=a,
        flags_ptr=last_round.flags,
        D=D,
        H=H,
        K=K,
        ACTIVATION=expert.activation,
        FAST=fast_sigmoid(x),
        GATED=expert.gated,
        BIAS=expert.b1 is not None,
        STORE_Z=store_z,
        FLAGS=last_round.flags.shape[0],
        K_MAJOR=w1_k_major,
        DESCRIPTOR=descriptors_usable(device, w1),
        **shared,
    )
    w2, w2_k_major = laid_out(expert.w2, rows, shared["PRECISION"], k_major=True)
    run(
        down_kernel,
        persistent(rows, N, O, device),
        "down",
        a=a,
        w2=w2,
        b2_ptr=expert.b2,
        y_ptr=ys,
        slots_ptr=last_round.slots,
        flags_ptr=last_round.flags,
        H=H,
        O=O,
        BIAS=expert.b2 is not None,
        K_MAJOR=w2_k_major,
        DESCRIPTOR=descriptors_usable(device, a, w2),
        **shared,
    )
    return combine(ys, permuted.inverse, K, weights), z


def has_free_choices(permuted: Permuted, num_experts: int) -> bool:
    """Whether some choices may be of what follows the experts. No kernel writes their rows, which have to be zero."""
    return permuted.offsets.shape[0] > num_experts + 1


def expand(tokens: Tensor, permuted: Permuted, num_experts: int, top_k: int, flags: Tensor | None = None) -> Tensor:
    """tokens [T, C] -> [T*K, C]: each choice's token, sorted by expert. Rows of choices that no expert runs are left
    as they are. Lowers the flags of later kernels on the way.
    """
    rows, C = permuted.order.shape[0], tokens.shape[1]
    out = tokens.new_empty(rows, C)
    BT, BC = 16, 128
    run(
        expand_kernel,
        (cdiv(rows, BT), cdiv(C, BC)),
        device=tokens.device,
        tokens_ptr=tokens,
        order_ptr=permuted.order,
        offsets_ptr=permuted.offsets,
        out_ptr=out,
        flags_ptr=flags,
        C=C,
        N=num_experts,
        K=top_k,
        FLAGS=0 if flags is None else flags.shape[0],
        BT=BT,
        BC=BC,
        num_warps=4,
    )
    return out


def combine(rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """rows [T*K, O] -> [T, O]: each token's K rows summed, weighted by weights [T, K] float32 if given."""
    T, O = inverse.shape[0] // top_k, rows.shape[1]
    y = rows.new_empty(T, O)
    BT, BO = 16, 128
    run(
        combine_kernel,
        (cdiv(T, BT), cdiv(O, BO)),
        device=rows.device,
        rows_ptr=rows,
        inverse_ptr=inverse,
        weights_ptr=weights,
        y_ptr=y,
        T=T,
        O=O,
        K=top_k,
        WEIGHTED=weights is not None,
        BT=BT,
        BO=BO,
        num_warps=4,
    )
    return y


class ExpertGrads(NamedTuple):
    """None for what was not asked for or is not there."""

    dxs: Tensor  # [T*K, D]
    dweights: Tensor  # [T, K] float32
    dw1: Tensor | None = None
    db1: Tensor | None = None
    dw2: Tensor | None = None
    db2: Tensor | None = None


def experts_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    permuted: Permuted,
    expert: ExpertWeights,
    z: Tensor,
    *,
    weight_grads: bool,
) -> ExpertGrads:
    """Gradients from dy [T, O]; those of the experts only with `weight_grads`."""
    D, K, (N, O, H) = x.shape[1], weights.shape[1], expert.w2.shape
    rows, H1, device = permuted.order.shape[0], expert.w1.shape[1], x.device
    shared = gemm_arguments(x, permuted, N)
    last_round = shared_round(shared["PRECISION"], da=expert.w2, dx=expert.w1)
    dys = expand(dy, permuted, N, K, last_round.flags)
    # Without w, da leaves float16's range sooner than the gradients that a user sees.
    da = torch.empty(rows, H, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=device)
    w2, w2_k_major = laid_out(expert.w2, rows, shared["PRECISION"], k_major=False)
    scratch = {"slots_ptr": last_round.slots, "flags_ptr": last_round.flags}
    run(
        back_kernel,
        persistent(rows, N, H, device),
        "da",
        rows=dys,
        w=w2,
        out_ptr=da,
        M=O,
        C=H,
        K_MAJOR=w2_k_major,
        DESCRIPTOR=descriptors_usable(device, dys, w2),
        **scratch,
        **shared,
    )
    dz = torch.empty_like(z)
    free = has_free_choices(permuted, N)
    dweights = torch.zeros_like(weights) if free else torch.empty_like(weights)
    wa = da if da.dtype == x.dtype else x.new_empty(rows, H)
    run(
        dz_kernel,
        (cdiv(rows, DZ_ROWS.value),),
        device=device,
        da_ptr=da,
        z_ptr=z,
        dy_ptr=dy,
        b2_ptr=expert.b2,
        weights_ptr=weights,
        order_ptr=permuted.order,
        offsets_ptr=permuted.offsets,
        dz_ptr=dz,
        wa_ptr=wa,
        dweights_ptr=dweights,
        ROWS=rows,
        H=H,
        O=O,
        N=N,
        NP=shared["NP"],
        K=K,
        ACTIVATION=expert.activation,
        FAST=fast_sigmoid(x),
        GATED=expert.gated,
        BIAS=expert.b2 is not None,
        BH=min(next_power_of_2(H), DZ_COLUMNS),
        num_warps=4,
    )
    dw1 = db1 = dw2 = db2 = None
    if weight_grads:
        dw2, db2 = weight_grad("dw2", dys, wa, permuted, like=(expert.w2, expert.b2), weights=weights)
        del dys  # x's copy may take its memory
        xs = expand(x, permuted, N, K)
        dw1, db1 = weight_grad("dw1", dz, xs, permuted, like=(expert.w1, expert.b1))
    w1, w1_k_major = laid_out(expert.w1, rows, shared["PRECISION"], k_major=False)
    dxs = (x.new_zeros if free else x.new_empty)(rows, D)
    run(
        back_kernel,
        persistent(rows, N, D, device),
        "dx",
        rows=dz,
        w=w1,
        out_ptr=dxs,
        M=H1,
        C=D,
        K_MAJOR=w1_k_major,
        DESCRIPTOR=descriptors_usable(device, dz, w1),
        **scratch,
        **shared,
    )
    return ExpertGrads(dxs, dweights, dw1, db1, dw2, db2)


def weight_grad(
    gemm: str,
    left: Tensor,
    right: Tensor,
    permuted: Permuted,
    *,
    like: tuple[Tensor, Tensor | None],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dw, db like the weight [N, M, C] and bias [N, M]: left^T right, of sorted rows left [T*K, M] and right [T*K, C],
    and sums of left, times `weights` [T, K] if given.
    """
    dw, db = torch.empty_like(like[0]), None if like[1] is None else torch.empty_like(like[1])
    N, M, C = dw.shape
    multiplied = precision(left)
    if multiplied == "tf32" and architecture(left.device) == "sm90":
        # Neither factor is K-major, which Hopper's tensor cores ask for in tf32. Through registers, three products took
        # less time than one on an H200: 733 us, and 850 in the faster of two tiles.
        multiplied = "tf32x3"

    def grid(meta: dict) -> tuple:
        programs = 0 if db is None else cdiv(M, DB_COLUMNS.value)
        return (programs + cdiv(M, meta["BM"]) * cdiv(C, meta["BN"]), N)

    run(
        weight_grad_kernel,
        grid,
        gemm,
        device=left.device,
        itemsize=left.element_size(),
        left=left,
        right=right,
        terms_ptr=left,
        weights_ptr=weights,
        order_ptr=permuted.order,
        offsets_ptr=permuted.offsets,
        dw_ptr=dw,
        db_ptr=db,
        M=M,
        C=C,
        rows_log2=rows_log2(permuted),
        WEIGHTED=weights is not None,
        BIAS=db is not None,
        DESCRIPTOR=descriptors_usable(left.device, left, right),
        PRECISION=multiplied,
    )
    return dw, db


def laid_out(weight: Tensor, rows: int, precision: str, *, k_major: bool) -> tuple[Tensor, bool]:
    """A weight as its product with `rows` rows is fastest, and whether it is K-major then; given, whether it is now.

    16-bit tensor cores take both. In tf32 they take K-major only, and other weights go through registers: on an H200,
    da took 2.8 times as long as up. In full precision, without tensor cores, threads want the product's columns side by
    side: down took 3.9 times as long as da. A copy costs a few percent of either.
    """
    wanted = precision != "ieee"
    few = rows < weight.shape[0] * ROWS_WORTH_A_COPY
    if weight.dtype != torch.float32 or wanted == k_major or few or architecture(weight.device) == "gfx942":
        return weight, k_major
    return weight.transpose(1, 2).contiguous(), wanted


def gemm_arguments(x: Tensor, permuted: Permuted, num_experts: int) -> dict:
    return {
        "device": x.device,
        "itemsize": x.element_size(),
        "offsets_ptr": permuted.offsets,
        "rows_log2": rows_log2(permuted),
        "N": num_experts,
        "NP": next_power_of_2(num_experts),
        "PRECISION": precision(x),
    }


def fast_sigmoid(x: Tensor) -> bool:
    """Whether activations may take NVIDIA's own approximation: where rounding to bfloat16 hides it."""
    return x.dtype == torch.bfloat16 and architecture(x.device).startswith("sm")


def rows_log2(permuted: Permuted) -> int:
    """The power of two of the number of rows T*K: as many tuned tiles as there are of these, not one for all T."""
    return permuted.order.shape[0].bit_length() - 1


def persistent(rows: int, num_experts: int, columns: int, device: torch.device):
    """Grid of a persistent kernel: the tile's programs per processor, or one per tile where there are fewer."""

    def grid(meta: dict) -> tuple:
        tiles = (cdiv(rows, meta["BM"]) + num_experts - 1) * cdiv(columns, meta["BN"])  # at most
        return (min(processors(device) * meta["PROGRAMS"], tiles),)

    return grid


def precision(x: Tensor) -> str:
    """How float32 operands are multiplied (tiles.PRECISIONS): as LIBMOE_FAST_FP32 says, else as torch's own switch
    was set, old (allow_tf32) or new, to "ieee" or "tf32"; and as "tf32x3" where nobody has said anything.

    On an H200 tf32x3 stays within twice the error of cuBLAS in full precision (tests/kernels/test_tiles.py), and by
    the machine code its loops issue 1.3 (dW on sm80) to 4 times (up on sm90) fewer instructions per product.
    Raises ConfigError for another word in the variable.
    """
    if x.dtype != torch.float32 or INTERPRETED:
        return "ieee"
    asked = os.environ.get(FP32_VARIABLE, "")
    if asked and asked not in PRECISIONS:
        raise ConfigError(f"{FP32_VARIABLE} is {asked!r}; expected one of {', '.join(PRECISIONS)}, or nothing")
    switch = torch.backends.cuda.matmul.fp32_precision  # "none" until it is set
    chosen = asked or (switch if switch in PRECISIONS else "tf32x3")
    if chosen == "tf32x3" and architecture(x.device) == "gfx942":
        return "ieee"  # what its matrix units do; Triton has no tf32x3 there
    return chosen
