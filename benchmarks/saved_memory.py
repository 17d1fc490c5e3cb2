"""What one layer keeps for backward, beside the least: x and the pre-activation z, 2TD + 2TKH bytes in bf16.

python benchmarks/saved_memory.py
"""

import copy

import torch

from libmoe_fast import MoE
from libmoe_fast.benchmarks.measure import Entrant, saved_bytes
from libmoe_fast.benchmarks.peers import add_peer

T, D, H, N, K = 2308, 1024, 4096, 4, 2  # CLIP-L/14-336, four images
PEERS = ("loop", "grouped_mm", "hf_grouped_mm")


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
        held = (*layer.parameters(), *layer.buffers())
        size = saved_bytes(Entrant(run=lambda layer=layer: layer(x), held=held))
        print(f"| {name} | {size / 1e6:.1f} | {size / least:.2f} |")


if __name__ == "__main__":
    main()
