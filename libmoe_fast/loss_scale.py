"""What a training loop multiplies its loss by: read from the graph when backward begins.

The auxiliary losses ride along in backward (ops.attach_aux_loss). They must arrive at the scale of the task's loss, and
no hook on a model sees all of that: trainers divide by accumulation steps, by the labels of several batches, multiply
by an fp16 loss scale, compute the loss outside of the model, or call the model's forward past its hooks (peft). All of
it is in the graph between the scalar that `backward` is called on and the reduction that made it:

    backward(root) -> scalar operations -> T: where scalars are added up, or where many numbers become one
    scale = gradient that arrives at T  *  labels summed up below T / what they are divided by below T

The second factor is 1 where T takes a mean. `torch.autograd.backward` and `grad` are wrapped for it, once, when the
first MoE layer is made: they are the one place that every loop passes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

MARK = "libmoe_fast.task_loss"  # in the metadata of a node: the scale is the gradient that arrives here
SUM_REDUCTION = 2  # of ATen's losses; 0 is none, 1 mean
ONE_BY_ONE = ("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "ToCopy", "Neg")  # a number remains a number
OPAQUE = """\
the loss comes from {name} and is divided afterwards: whether that makes it a mean over its own labels cannot be seen, \
and the auxiliary losses are scaled as if it did. If the number counts the labels of several batches, \
call libmoe_fast.scale_aux_loss(loss) on each batch's mean loss."""

# One scalar per device, which all layers there read in backward and hold: a device without layers has none, so that
# backward on a GPU never waits for a copy to the host.
_shared: WeakValueDictionary[torch.device, Tensor] = WeakValueDictionary()


def shared(device: torch.device) -> Tensor:
    """The scalar float32 that holds the scale on a device while backward runs. 1 before."""
    if device.type == "meta" or detect_fake_mode() is not None:  # nothing runs there
        return torch.ones((), dtype=torch.float32, device=device)
    scale = _shared.get(device)
    if scale is None:
        with torch.inference_mode(False):
            scale = _shared[device] = torch.ones((), dtype=torch.float32, device=device)
    return scale


def mark(loss: Tensor) -> None:
    """The scale is the gradient that arrives at `loss`, whatever made it."""
    if loss.grad_fn is not None:
        loss.grad_fn.metadata[MARK] = loss.output_nr


def watch() -> None:
    """Wraps torch.autograd.backward and torch.autograd.grad, once."""
    for name in ("backward", "grad"):
        original = getattr(torch.autograd, name)
        if not hasattr(original, "_reads_loss_scale"):
            setattr(torch.autograd, name, _reading(original))


def _reading(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapped(tensors, *args, **kwargs):
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        nested = torch._C._current_graph_task_id() != -1  # reentrant checkpointing, inside another backward
        meta = any(root.is_meta for root in roots if isinstance(root, Tensor))
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func, which forbids writing
        if nested or meta or transformed or detect_fake_mode(roots) is not None:  # a compiler traces backward
            return original(tensors, *args, **kwargs)
        with _scale_from(roots):
            return original(tensors, *args, **kwargs)

    wrapped._reads_loss_scale = True
    return wrapped


@contextlib.contextmanager
def _scale_from(roots: Sequence[Any]) -> Iterator[None]:
    """Inside, the gradient that reaches the task's loss is written to the shared scalars as soon as it is there."""
    for scale in list(_shared.values()):
        scale.data.fill_(1.0)
    handles = []
    if len(roots) == 1 and isinstance(roots[0], Tensor) and roots[0].numel() == 1 and roots[0].grad_fn is not None:
        node, output, factor = _find(roots[0].grad_fn, roots[0].output_nr)

        def write(gradients: tuple[Tensor | None, ...]) -> None:
            if (gradient := gradients[output]) is not None:
                # A sum of log-probabilities is subtracted: the sign is the task's, and no auxiliary loss is to rise.
                value = (gradient.detach().reshape(()).float() * factor).abs()
                for scale in list(_shared.values()):
                    scale.data.copy_(value)  # .data: this graph has saved the tensor, and must see the new value

        handles.append(node.register_prehook(write))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find(node: Any, output: int) -> tuple[Any, int, Tensor | float]:
    """(node, which of its outputs, factor): the scale is the gradient that arrives there times the factor."""
    if (marked := _marked(node, output)) is not None:
        return *marked, 1.0
    above = None
    while True:
        inputs = _scalar_inputs(node, output)
        if (len(inputs) == 1 and len(_inputs(node)) == 1) or "DDPSink" in node.name():
            above = above if node.name().startswith("Neg") else (node, output)
            node, output = inputs[0]
            continue
        if inputs:  # scalars added up: mixture weights below are multiplied, normalisers divide
            return node, output, next((share for edge in inputs if (share := _share(edge)) is not None), 1.0)
        count = _count(node)
        if count is None and above is not None and above[0].name().startswith("Div"):
            if not node.name().startswith("Sum"):
                _warn_once(node.name())
                return *above, 1.0
            # Divided by at most as many as there are terms: the mean of those that count; by more: of several batches.
            return *above, (_terms(node) / above[0]._saved_other.detach()).clamp(max=1.0)
        return node, output, 1.0 if count is None else count


def _marked(node: Any, output: int) -> tuple[Any, int] | None:
    """The first marked scalar, from the root downwards."""
    level = [(node, output)]
    while level:
        for node, output in level:
            if node.metadata.get(MARK) == output:
                return node, output
        level = list(dict.fromkeys(edge for parent in level for edge in _scalar_inputs(*parent)))
    return None


def _share(edge: tuple[Any, int]) -> Tensor | float | None:
    """Labels that a scalar sums up, over what it is divided by; None where nothing says how many they are."""
    (node, output), divisor = edge, 1.0
    while len(inputs := _scalar_inputs(node, output)) == 1 == len(_inputs(node)):
        if node.name().startswith("Div"):
            divisor = node._saved_other * divisor
        node, output = inputs[0]
    count = None if inputs else _count(node)
    return None if count is None else count / divisor


def _count(node: Any) -> Tensor | float | None:
    """How many labels the sum that `node` takes runs over; 1 for a mean, None for what does not say."""
    name = node.name()
    if name.startswith("NllLoss"):
        return node._saved_total_weight if node._saved_reduction == SUM_REDUCTION else 1.0
    if name.startswith("Mean"):
        return 1.0
    return _counted_terms(node) if name.startswith("Sum") else None


def _counted_terms(node: Any) -> Tensor | None:
    """How many terms of the sum that `node` takes are labels: what a mask or the labels say on the way to them."""
    weights = None
    while len(inputs := _inputs(node)) == 1:
        node = inputs[0][0]
        name = node.name()
        if name.startswith("MaskedFill"):  # label smoothing in transformers, TRL: blanks what has no label
            return (~node._saved_mask).sum()
        if name.startswith("MaskedScatter"):  # TRL on a GPU: only what has one is there
            return node._saved_mask.sum()
        if name.startswith("NllLoss"):
            return (node._saved_target != node._saved_ignore_index).sum()
        if name.startswith("Mul"):
            other = node._saved_other if node.next_functions[0][0] is not None else node._saved_self
            if other.numel() > 1:
                if not other.is_floating_point():  # a mask
                    return other.count_nonzero()
                weights = other.count_nonzero() if weights is None else weights
        elif not name.startswith(ONE_BY_ONE):
            break
    return weights


def _terms(node: Any) -> int:
    """Numbers that the sum `node` adds up."""
    below, output = _inputs(node)[0]
    return math.prod(below._input_metadata[output].shape)


def _inputs(node: Any) -> list[tuple[Any, int]]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _scalar_inputs(node: Any, output: int) -> list[tuple[Any, int]]:
    """The differentiable inputs of a node that are single numbers; [] unless all are."""
    edges = _inputs(node)
    if "DDPSink" in node.name():  # hands every output of a model through
        edges = [edges[output]]
    return edges if all(_is_scalar(*edge) for edge in edges) else []


def _is_scalar(node: Any, output: int) -> bool:
    metadata = node._input_metadata  # of the gradients that come in: of what the node made
    return output < len(metadata) and all(size == 1 for size in metadata[output].shape)


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(OPAQUE.format(name=name), stacklevel=2)
