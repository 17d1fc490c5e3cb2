"""One training step of a tiny LLaVA, forward to optimizer: dense (the limit), with LibMoE's loop, and with our layers.

Its vision tower has 4 CLIP layers and its language model 2 Phi-3 layers, D = 64: what it shows is overhead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from libmoe_fast.benchmarks.arena import LOOP, OURS, Arena
from libmoe_fast.benchmarks.bench_encoder import with_peer
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.measure import Entrant
from libmoe_fast.upcycle import upcycle

SEQUENCE = 48  # tokens of one sample: 16 of the image, the rest text
IMAGE_TOKENS = 16


def build(case: Case, device: torch.device) -> Arena:
    from libmoe_fast.train.tiny import tiny_llava

    shape = case.shape
    dense = tiny_llava("clip")[0].to(device, case.torch_dtype).train()
    ours = upcycle(copy.deepcopy(dense), router=case.router, num_experts=shape.num_experts, top_k=shape.top_k)
    batch = make_batch(case, dense.config.image_token_id, device)
    models = {OURS: ours, LOOP: with_peer(ours, LOOP)}
    entrants = {
        name: Entrant(training_step(model, batch), held=tuple(model.parameters())) for name, model in models.items()
    }
    return Arena(entrants, "dense model", partial(training_step, dense, batch), {})


def make_batch(case: Case, image_token: int, device: torch.device) -> dict[str, Tensor]:
    """Samples of SEQUENCE random tokens, the image first; fewer tokens than that make one shorter sample."""
    sequence = min(SEQUENCE, case.tokens)
    samples = case.tokens // sequence
    ids = torch.randint(image_token + 1, 200, (samples, sequence), device=device)
    ids[:, :IMAGE_TOKENS] = image_token
    labels = ids.masked_fill(ids == image_token, -100)
    pixels = torch.randn(samples, 3, 32, 32, device=device).to(case.torch_dtype)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_training(case, race):
    race(case)
