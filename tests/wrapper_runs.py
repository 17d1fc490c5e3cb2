"""Started by test_wrappers.py with torchrun: three steps in each wrapper, beside the plain model's.

torchrun --nproc_per_node 2 wrapper_runs.py FOLDER
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

from libmoe_fast import ConfigError, load_model, moe_layers, save_model, upcycle
from libmoe_fast.train.tiny import tiny_llava

LR = 0.1
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, processor = dense()
    ids = processor.tokenizer("<image>" * 16 + " odd?", return_tensors="pt")["input_ids"]

    def batch(of: int) -> dict:
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(of))
        return {"input_ids": ids, "pixel_values": pixels, "labels": ids}

    def steps(model, losses_of) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        logged = []
        for _ in range(3):
            optimizer.zero_grad()
            losses = {of: model(**batch(of)).loss for of in losses_of}
            (sum(losses.values()) / len(losses)).backward()
            optimizer.step()
            logged.append(losses[rank].item())
        return logged

    plain = swapped(dense()[0])
    expected = steps(plain, range(processes))
    found = {}

    def compare(name: str, losses: list[float]) -> None:
        found[name] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))

    wrapped = DistributedDataParallel(swapped(dense()[0]), find_unused_parameters=True)
    compare("DDP", steps(wrapped, [rank]))
    wrapped = FullyShardedDataParallel(swapped(dense()[0]), use_orig_params=True, device_id=torch.device("cpu"))
    compare("FSDP1", steps(wrapped, [rank]))

    mesh = init_device_mesh("cpu", (processes,))
    sharded = swapped(dense()[0])
    for layer in moe_layers(sharded).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    compare("FSDP2", steps(sharded, [rank]))
    save_model(sharded, folder / "fsdp2")
    found["FSDP2 saved"] = distance(load_model(folder / "fsdp2"), plain)
    sharded = dense()[0]
    fully_shard(sharded, mesh=mesh)
    try:
        upcycle(sharded)
    except ConfigError as error:
        found["sharded before"] = str(error).replace(": ", " ")

    if rank == 0:
        model.save_pretrained(folder / "dense")
    dist.barrier()
    config = HfDeepSpeedConfig(ZERO3)  # while it lives, from_pretrained partitions what it loads
    partitioned = swapped(LlavaForConditionalGeneration.from_pretrained(folder / "dense"))
    engine, *_ = deepspeed.initialize(
        model=partitioned, optimizer=torch.optim.SGD(partitioned.parameters(), lr=LR), config=config.config
    )
    losses = []
    for _ in range(3):
        loss = engine(**batch(rank)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    compare("ZeRO-3 from_pretrained", losses)
    save_model(engine.module, folder / "zero3")
    del config  # else what is loaded is partitioned, too
    found["ZeRO-3 saved"] = distance(load_model(folder / "zero3"), plain)
    (folder / f"rank{rank}.txt").write_text("".join(f"{name}: {value}\n" for name, value in found.items()))


def distance(model, other) -> float:
    state = model.state_dict()
    return max((state[name] - tensor).abs().max().item() for name, tensor in other.state_dict().items())


def dense():
    return tiny_llava("clip", dim=16, vision_layers=2, text_layers=1)


def swapped(model):
    torch.manual_seed(0)
    return upcycle(model, num_experts=3).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
