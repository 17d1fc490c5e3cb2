"""What one layer keeps for backward, beside the least: x and the pre-activation z, 2TD + 2TKH bytes in bf16.

python benchmarks/saved_memory.py
"""

import copy

import torch
from torch import Tensor, nn

from libmoe_fast import MoE
from libmoe_fast.benchmarks.peers import add_peer

T, D, H, N, K = 2308, 1024, 4096, 4, 2  # CLIP-L/14-336, four images
PEERS = ("loop", "grouped_mm", "hf_grouped_mm")


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps alive between forward and backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, T // 4, D, dtype=torch.bfloat16, requires_grad=True)
    moe = MoE(D, H, D, num_experts=N, top_k=K, dtype=torch.bfloat16, backend="cpu")
    layers = {"ours, cpu": moe, "ours, reference": copy.deepcopy(moe)}
    layers["ours, reference"].backend = "reference"
    layers |= {name: add_peer(copy.deepcopy(moe), name) for name in PEERS}
    least = 2 * T * D + 2 * T * K * H
    print("| layer | kept for backward (MB) | over 2TD + 2TKH |\n|---|---|---|")
    for name, layer in layers.items():
        size = kept_bytes(layer, x)
        print(f"| {name} | {size / 1e6:.1f} | {size / least:.2f} |")


if __name__ == "__main__":
    main()
