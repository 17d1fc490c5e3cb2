"""Dispatch: routing and permutation, forward and backward, on plain tensors.

    dispatch           route, permute                           2 launches
    dispatch_backward  dx (with the sum over K), dW, their sum  3

Nothing here waits for the device: sizes come from shapes, and what depends on the routing stays in tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from libmoe_fast.spec import RouterSpec, routed_shapes

from .permutation import choices_per_step, count_kernel, padded_experts, permute_kernel
from .routing import route_kernel
from .routing_backward import route_backward_kernel, router_grad_kernel, router_reduce_kernel
from .run import cdiv, next_power_of_2, run

BLOCK_TOKENS = 32  # tokens per block of the routing kernels, at most
BLOCK_SCORES = 2048  # and their scores [tokens, N], which stay in registers
STEP_EXPERTS = 32  # in the products of backward, whose operands all lie in registers
BLOCK_CHOICES = 256  # choices per block, where another router made them
PERMUTE_PROGRAMS = 512  # at most: each reads what all blocks counted, so their number must not grow with T
FORWARD_STEP, BACKWARD_STEP = 256, 128  # bytes of a row of x per step of the routing kernels
SLICE = 256  # columns of dx per program of route_backward
SPLIT_TOKENS, MOST_SPLITS = 256, 16  # tokens per part of the router's weight gradient, and parts, which are added up


class Routed(NamedTuple):
    """What routing keeps for backward. Tensors that a spec has no use for are None."""

    index: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float32, as are the following
    probs: Tensor  # [T, N]
    logits: Tensor  # [T, N]
    x_norm: Tensor | None  # [T], tau included
    w_norm: Tensor | None  # [N]
    cosines: Tensor | None  # [T, N]
    noise_scale: Tensor | None  # [T, N]


class Permuted(NamedTuple):
    """The permutation of the T*K choices."""

    order: Tensor  # [T*K] int64
    inverse: Tensor  # [T*K] int64
    offsets: Tensor  # [N + 1] int64


class LossValues(NamedTuple):
    """What the loss sums come to, float32."""

    losses: Tensor  # [3]: aux, balance, z
    share: Tensor  # [N]: share of the choices
    first_share: Tensor  # [S, N]: f of the balance loss, per sequence


class BlockSums(NamedTuple):
    """What each block of tokens leaves for the permutation to add up."""

    counts: Tensor  # [blocks, N] int32
    first: Tensor  # [blocks, N] int32
    prob_sums: Tensor  # [blocks, N] float32
    z_sums: Tensor  # [blocks] float32


class RouterInputs(NamedTuple):
    """What scores are made of. A None is an option that the spec does not use."""

    x: Tensor  # [T, D]
    w: Tensor  # [N, D]
    bias: Tensor | None = None  # [N]
    noise: Tensor | None = None  # [T, N] float32
    noise_w: Tensor | None = None  # [N, D]
    temperature: Tensor | None = None  # [], a learned one


def pointers(tensors: NamedTuple) -> dict[str, Tensor | None]:
    """Fields as a kernel's arguments: name -> name_ptr."""
    return {f"{name}_ptr": tensor for name, tensor in tensors._asdict().items()}


def spec_arguments(spec: RouterSpec, inputs: RouterInputs, temperature: float, block: int, step: int) -> dict:
    """The arguments that both directions of routing share. step: bytes of a row of x."""
    depth, NP = inputs.x.shape[1], padded_experts(spec.num_experts)
    return {
        "D": depth,
        "temperature": temperature,
        "tau": spec.tau,
        "N": spec.num_experts,
        "NP": NP,
        "K": spec.top_k,
        "KP": next_power_of_2(spec.top_k),
        "COSINE": spec.score == "cosine",
        "BIAS": spec.bias,
        "PROBABILITY": spec.probability,
        "GATE": spec.gate,
        "NOISE": spec.noise if inputs.noise is not None else "off",
        "LEARNED_TEMPERATURE": inputs.temperature is not None,
        "BT": block,
        "BD": depth_step(inputs.x, spec.num_experts, step),
    }


def depth_step(x: Tensor, num_experts: int, step: int) -> int:
    """Columns of x per step of `step` bytes, 16 at least; fewer with many experts: [N, columns] stays in registers."""
    most = max(32, 2048 // padded_experts(num_experts))
    if x.shape[1] % 16:
        step //= 2  # each element is then loaded by itself, which takes registers
    return max(16, min(step // x.element_size(), next_power_of_2(x.shape[1]), most))


def block_tokens(length: int, num_experts: int) -> int:
    """Tokens per block; 16 rows are the fewest that a product takes."""
    tokens = min(BLOCK_TOKENS, BLOCK_SCORES // padded_experts(num_experts), next_power_of_2(length))
    return max(16, tokens)


def blocks_per_program(blocks: int) -> int:
    """How many blocks a program of permute takes: a power of two, as each value is compiled for itself."""
    return next_power_of_2(cdiv(blocks, PERMUTE_PROGRAMS))


def dispatch(
    inputs: RouterInputs,
    *,
    spec: RouterSpec,
    temperature: float,
    sequences: int,
    over_topk: bool,
    balance_coef: float,
    z_coef: float,
) -> tuple[Routed, Permuted, LossValues]:
    """Chooses experts for x [T, D], `sequences` equally long sequences, and sorts the choices by expert. T > 0."""
    x, N, K = inputs.x, spec.num_experts, spec.top_k
    T, device = x.shape[0], x.device
    length = T // sequences
    block = block_tokens(length, N)
    blocks = sequences * cdiv(length, block)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(*shape: int, dtype=torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    shapes = routed_shapes(spec, T, inputs.noise is not None)
    kinds = {name: integers if name == "index" else floats for name in shapes}
    routed = Routed(**{name: None if shape is None else kinds[name](*shape) for name, shape in shapes.items()})
    counts, first = (integers(blocks, N, dtype=torch.int32) for _ in range(2))
    sums = BlockSums(counts, first, prob_sums=floats(blocks, N), z_sums=floats(blocks))
    run(
        route_kernel,
        (blocks,),
        device=device,
        **pointers(inputs),
        **pointers(routed),
        **pointers(sums),
        length=length,
        noise_std=spec.noise_std,
        OVER_TOPK=over_topk,
        num_warps=4 if N <= 128 else 8,  # the scores of a block, [tokens, N], take their registers
        **spec_arguments(spec, inputs, temperature, block, FORWARD_STEP),
    )
    per = blocks_per_program(blocks)
    permuted = Permuted(integers(T * K), integers(T * K), integers(N + 1))
    values = LossValues(floats(3), floats(N), floats(sequences, N))
    run(
        permute_kernel,
        (cdiv(blocks, per) + 1,),
        device=device,
        index_ptr=routed.index,
        **pointers(sums),
        **pointers(permuted),
        **pointers(values),
        length=length,
        sequences=sequences,
        balance_coef=balance_coef,
        z_coef=z_coef,
        N=N,
        NP=padded_experts(N),
        K=K,
        LOSSES=True,
        OVER_TOPK=over_topk,
        BT=block,
        PER=per,
        BLOCKS=choices_per_step(N) // 4,
        CHOICES=min(choices_per_step(N), max(64, next_power_of_2(per * block * K))),
        SEQUENCES=min(choices_per_step(N) // 4, next_power_of_2(sequences)),
        num_warps=4,
    )
    return routed, permuted, values


def permute(index: Tensor, num_experts: int) -> Permuted:
    """Sorts an index [T, K] that another router made; two launches. T > 0."""
    choices, device, NP = index.numel(), index.device, padded_experts(num_experts)
    step = min(choices_per_step(num_experts), BLOCK_CHOICES)
    blocks = cdiv(choices, BLOCK_CHOICES)
    per = blocks_per_program(blocks)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    permuted = Permuted(index.new_empty(choices), index.new_empty(choices), index.new_empty(num_experts + 1))
    sizes = {"N": num_experts, "NP": NP, "BT": BLOCK_CHOICES, "CHOICES": step, "num_warps": 4}
    run(count_kernel, (blocks,), device=device, index_ptr=index, counts_ptr=counts, choices=choices, **sizes)
    run(
        permute_kernel,
        (cdiv(blocks, per) + 1,),
        device=device,
        index_ptr=index,
        **pointers(BlockSums(counts, None, None, None)),
        **pointers(permuted),
        **pointers(LossValues(None, None, None)),
        length=choices,  # as one sequence of T*K tokens with one choice each
        sequences=1,
        balance_coef=0.0,
        z_coef=0.0,
        K=1,
        LOSSES=False,
        OVER_TOPK=False,
        PER=per,
        BLOCKS=step,
        SEQUENCES=1,
        **sizes,
    )
    return permuted


class RouterGrads(NamedTuple):
    """None for what the spec does not learn."""

    dx: Tensor  # [T, D]
    dw: Tensor  # [N, D]
    dbias: Tensor | None  # [N]
    dnoise_w: Tensor | None  # [N, D]
    dtemperature: Tensor | None  # []


def dispatch_backward(
    inputs: RouterInputs,
    routed: Routed,
    inverse: Tensor,
    first_share: Tensor,
    *,
    dweights: Tensor,
    dlosses: Tensor | None,
    aux_scale: Tensor | None,
    dxs: Tensor | None,
    spec: RouterSpec,
    temperature: float,
    balance_coef: float,
    z_coef: float,
) -> RouterGrads:
    """Gradients of what `dispatch` took.

    dweights [T, K] float32; dlosses [3], the gradients of the aux, balance and z loss, and aux_scale, a further one
    of the aux loss, may be None;
    dxs [T*K, D], the experts' gradient of their rows, is summed over K into dx.
    """
    x, N = inputs.x, spec.num_experts
    (T, D), device = x.shape, x.device
    sequences = first_share.shape[0]
    length = T // sequences
    block = block_tokens(length, N)
    blocks = sequences * cdiv(length, block)
    learned_noise = routed.noise_scale is not None

    def floats(*shape: int, needed: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if needed else None

    dx = torch.empty_like(x)
    ddot, dnoise = floats(T, N), floats(T, N, needed=learned_noise)
    dbias_parts = floats(blocks, N, needed=spec.bias != "none")
    dw_norm = floats(blocks, N, needed=spec.score == "cosine")
    dtemperature_parts = floats(blocks, needed=inputs.temperature is not None)
    arguments = spec_arguments(spec, inputs, temperature, block, BACKWARD_STEP)
    # With many experts, a program reads scores again that it has stored itself: it has all columns.
    slice_ = SLICE if padded_experts(N) <= STEP_EXPERTS else next_power_of_2(D)
    warps = 8 if N >= 64 or D % 16 else 4  # fewer would not hold what is [tokens, N], or loads of single elements
    run(
        route_backward_kernel,
        (blocks, cdiv(D, slice_)),
        device=device,
        **{name: value for name, value in pointers(inputs).items() if name != "bias_ptr"},
        **pointers(routed),
        first_share_ptr=first_share,
        dweights_ptr=dweights,
        dlosses_ptr=dlosses,
        aux_scale_ptr=aux_scale,
        dxs_ptr=dxs,
        inverse_ptr=inverse,
        dx_ptr=dx,
        ddot_ptr=ddot,
        dnoise_ptr=dnoise,
        dbias_ptr=dbias_parts,
        dw_norm_ptr=dw_norm,
        dtemperature_ptr=dtemperature_parts,
        length=length,
        sequences=sequences,
        balance_coef=balance_coef,
        z_coef=z_coef,
        AUX=dlosses is not None or aux_scale is not None,
        ATTACH=aux_scale is not None,
        DLOSSES=dlosses is not None,
        HAS_DXS=dxs is not None,
        BN=min(STEP_EXPERTS, padded_experts(N)),
        SLICE=slice_,
        num_warps=warps,
        **arguments,
    )

    BD, split = depth_step(x, N, BACKWARD_STEP), max(SPLIT_TOKENS, next_power_of_2(cdiv(T, MOST_SPLITS)))
    splits = cdiv(T, split)
    parts = floats(splits, N * (2 if learned_noise else 1), D)
    sizes = {"N": N, "NP": padded_experts(N), "LEARNED_NOISE": learned_noise, "BD": BD, "num_warps": warps}
    run(
        router_grad_kernel,
        (cdiv(D, BD), splits),
        device=device,
        x_ptr=x,
        ddot_ptr=ddot,
        dnoise_ptr=dnoise,
        parts_ptr=parts,
        T=T,
        D=D,
        SPLIT=split,
        BT=32 if N <= 32 else 16,
        **sizes,
    )
    grads = RouterGrads(
        dx=dx,
        dw=torch.empty_like(inputs.w),
        dbias=None if spec.bias == "none" else torch.empty_like(inputs.bias),
        dnoise_w=torch.empty_like(inputs.noise_w) if learned_noise else None,
        dtemperature=None if inputs.temperature is None else torch.empty_like(inputs.temperature),
    )
    run(
        router_reduce_kernel,
        (cdiv(D, BD),),
        device=device,
        parts_ptr=parts,
        w_ptr=inputs.w,
        w_norm_ptr=routed.w_norm,
        dw_norm_ptr=dw_norm,
        dbias_parts_ptr=dbias_parts,
        dtemperature_parts_ptr=dtemperature_parts,
        **{name: value for name, value in pointers(grads).items() if name != "dx_ptr"},
        D=D,
        blocks=blocks,
        splits=splits,
        tau=spec.tau,
        COSINE=spec.score == "cosine",
        BIAS=spec.bias != "none",
        LEARNED_TEMPERATURE=inputs.temperature is not None,
        BLOCKS=choices_per_step(N),
        **sizes,
    )
    return grads
