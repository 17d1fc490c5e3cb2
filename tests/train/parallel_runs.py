"""Started by test_expert_parallel.py with torchrun: layers and training runs whose experts are shared among processes.

torchrun --nproc_per_node 4 parallel_runs.py FOLDER MODEL IMAGES
"""

import copy
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from process_runs import stop_after_first_step
from tiny_runs import make_config
from torch import Tensor, nn

from libmoe_fast import ConfigError, MoE, load_model, save_model, shard_experts, upcycle
from libmoe_fast.train import loop
from libmoe_fast.train.tiny import tiny_llava

TOKENS = (7, 0, 12, 5)  # of each process: none at all, and lengths that no other has

# What the layer is, and why.
LAYERS = {
    "64 experts, 8 per token": {"num_experts": 64, "top_k": 8, "router": "smoe"},
    "K = 1": {"num_experts": 4, "top_k": 1, "router": "sigmoid"},
    "cosines": {"num_experts": 4, "top_k": 2, "router": "cosine"},
    "perturbed": {"num_experts": 8, "top_k": 3, "router": "perturbed_cosine", "gated": True, "bias": False},
    "no auxiliary loss": {"num_experts": 4, "top_k": 2, "router": "hyper"},
    "choices of no expert": {"num_experts": 4, "top_k": 3, "router": "moe_plus_plus"},
    "one for all tokens": {"num_experts": 4, "top_k": 2, "router": "shared_v3"},
}


def main(folder: Path, model: Path, images: Path) -> None:
    deepspeed.init_distributed("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = {}
    for group in (None, pair):
        for name, options in LAYERS.items():
            for backend in ("cpu", "reference"):
                for dtype in (torch.float32, torch.bfloat16):
                    key = f"{(group or dist.group.WORLD).size()} processes, {name}, {backend}, {dtype}"
                    found[key] = layer_errors(options, group, backend, dtype)
    found["saved"] = saved_error(folder / "saved")
    found["refused"] = refusal()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))

    shared = {"optim__batch_size": 2, "engine__zero_stage": 2}  # x 4 processes = 8
    fours = {**shared, "engine__expert_parallel": processes, "engine__checkpointing": "reentrant"}
    loop.train(make_config(folder / "of_4", model, images, **fours))
    pairs = {**shared, "engine__expert_parallel": 2, "engine__checkpointing": "non_reentrant"}
    loop.train(make_config(folder / "of_2", model, images, **pairs))
    stopped = make_config(folder / "stopped", model, images, **pairs)
    stop_after_first_step(stopped, rank="1")
    loop.train(stopped)
    stop_after_first_step(make_config(folder / "left", model, images, **pairs), rank="1")


def layer_errors(options: dict, group: dist.ProcessGroup | None, backend: str, dtype: torch.dtype) -> dict[str, list]:
    """Of outputs and gradients: how far the parallel layer, and the whole one, are from the whole one in float64."""
    torch.manual_seed(0)
    plain = MoE(12, 20, 12, backend=backend, **options).to(dtype).train()
    parallel = shard_experts(nn.Sequential(copy.deepcopy(plain)), group)[0]
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    results = {
        name: [computed(layer, of) for of in members]
        for name, layer in {"plain": plain, "exact": exactly(plain)}.items()
    }
    own = members.index(dist.get_rank())
    result = computed(parallel, members[own])
    experts = parallel.experts
    errors = {}
    for name, value in result.items():
        if name.startswith("experts."):  # everybody's tokens have trained them
            part = slice(experts.first, experts.first + experts.num_experts)
            plain_value, exact = (sum(each[name] for each in results[kind])[part] for kind in ("plain", "exact"))
        else:
            plain_value, exact = (results[kind][own][name] for kind in ("plain", "exact"))
        errors[name] = [distance(value, exact), distance(plain_value, exact), distance(exact, 0 * exact)]
    return errors


def exactly(layer: MoE) -> MoE:
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    return exact


def computed(layer: MoE, of: int) -> dict[str, Tensor]:
    """Output and gradients for the tokens of process `of`, in float64; the auxiliary losses are in them."""
    generator = torch.Generator().manual_seed(of)
    dtype = layer.experts.w1.dtype
    inputs = (torch.randn(TOKENS[of], 12, generator=generator).bfloat16() for _ in range(2))  # exact in every dtype
    x, dy = (tensor.to(dtype) for tensor in inputs)
    layer.zero_grad()
    y = layer(x.requires_grad_())
    (y * dy).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double() for name, tensor in {"y": y, "x": x.grad, **grads}.items()}


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item() if one.numel() else 0.0


def saved_error(folder: Path) -> float:
    """Between a model and what was saved of it with its experts shared, and between its parts and those loaded."""
    torch.manual_seed(0)
    plain = upcycle(tiny_llava("clip", dim=16, vision_layers=2, text_layers=1)[0])
    whole = plain.state_dict()
    parallel = shard_experts(copy.deepcopy(plain))
    save_model(parallel, folder)
    saved = load_model(folder).state_dict()
    error = max(distance(saved[name], tensor) for name, tensor in whole.items())
    changed = {name: tensor + 1 for name, tensor in whole.items()}
    before = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    parallel.load_state_dict(changed)
    return max(error, *(distance(tensor, before[name] + 1) for name, tensor in parallel.state_dict().items()))


def refusal() -> list[str]:
    messages = []
    layer = nn.Sequential(MoE(4, 4, 4, num_experts=6, top_k=2))
    for model in (layer, nn.Linear(2, 2), shard_experts(nn.Sequential(MoE(4, 4, 4, num_experts=4, top_k=2)))):
        try:
            shard_experts(model)
        except ConfigError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
