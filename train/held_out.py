"""The loss on records that are not trained on: where a run was best, and when to stop it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from libmoe_fast.analysis.results import HELD_OUT
from libmoe_fast.files import write_atomically
from libmoe_fast.train.config import DataConfig, TrainConfig
from libmoe_fast.train.data import Collator, ConversationDataset, batches
from libmoe_fast.train.engine import from_first_rank, model_inputs
from libmoe_fast.train.records import Records
from libmoe_fast.train.state import disk_errors


class HeldOut:
    """data.held_out, measured when weights are exported and at the end. All ranks make one and call it together.

    Args:
        processor, image_tokens: as ConversationDataset takes them.
        records: those of held_out_data.
        first_step: steps done before; what an earlier, killed run measured later is forgotten.
    """

    def __init__(
        self,
        config: TrainConfig,
        processor: Any,
        collator: Collator,
        *,
        image_tokens: int,
        records: Records,
        first_step: int,
    ) -> None:
        template = config.model.chat_template
        self.dataset = ConversationDataset(
            held_out_data(config), processor, image_tokens=image_tokens, template=template, records=records
        )
        self.collator, self.patience = collator, config.run.patience
        self.size = config.optim.batch_size
        self.file = Path(config.run.folder) / HELD_OUT
        self.measured: list[dict[str, Any]] = from_first_rank(
            [line for line in read_held_out(self.file.parent) if line["step"] <= first_step]
        )

    @torch.no_grad()
    def measure(self, engine: Any, step: int) -> None:
        """Adds the loss after `step` steps to those before. The model is in evaluation mode meanwhile."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = list(range(len(self.dataset)))[rank::ranks]
        # All ranks pass equally often through the model, as ZeRO-3 demands: at the end with a sample that counts for 0.
        passes = math.ceil(math.ceil(len(self.dataset) / ranks) / self.size)
        cut = [own[i * self.size : (i + 1) * self.size] for i in range(passes)]
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        engine.eval()
        try:
            for indices, batch in zip(cut, batches(self.dataset, [i or [0] for i in cut], self.collator), strict=True):
                inputs = model_inputs(engine, batch.inputs)
                loss = engine(**inputs, num_items_in_batch=1, use_cache=False).loss  # a sum over the labels
                if indices:
                    sums += torch.stack([loss.double(), loss.new_tensor(batch.labels, dtype=torch.float64)])
        finally:
            engine.train()
        dist.all_reduce(sums)
        total, labels = sums.tolist()
        self.measured.append({"step": step, "loss": total / labels})
        if rank == 0:
            with disk_errors(str(self.file)):
                write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in self.measured))

    @property
    def best(self) -> dict[str, Any]:
        """The lowest loss so far, the first of equals; one that is not finite is no loss."""
        return min(self.measured, key=lambda line: (not math.isfinite(line["loss"]), line["loss"]))

    @property
    def exhausted(self) -> bool:
        """Whether the last `run.patience` measurements were all no better than the best before them."""
        since = len(self.measured) - 1 - self.measured.index(self.best)
        return self.patience is not None and since >= self.patience

    def __str__(self) -> str:
        last, best = self.measured[-1], self.best
        now, lowest = (f"{line['loss']:.4f} after step {line['step']}" for line in (last, best))
        return f"held-out loss {now}; the lowest is {lowest}"


def held_out_data(config: TrainConfig) -> DataConfig:
    """The settings to read data.held_out with: those of the training data, and all of its records."""
    return replace(config.data, file=config.data.held_out, fraction=1.0)


def read_held_out(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured, by step; [] where it has not."""
    file = folder / HELD_OUT
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
