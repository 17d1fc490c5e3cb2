"""What a run reports: a progress bar, log.jsonl with a line per step, TensorBoard, and the list of bad samples."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libmoe_fast.errors import CheckpointError, DivergedError
from libmoe_fast.files import write_atomically
from libmoe_fast.train.config import RunConfig
from libmoe_fast.train.state import disk_errors
from libmoe_fast.upcycle import moe_layers

DIVERGED = """\
{what}; nothing was saved from there on, and what was saved before is unharmed. Check the weights that the run starts \
from and its samples, or start another run.folder with a lower optim.lr, a longer optim.warmup_ratio or \
engine.dtype bf16"""


class Statistics:
    """Reads a forward pass's loss and routing into one vector, on the device and without waiting for it.

    [loss, 1 if there were images, balance loss, z-loss, expert shares of layer 1, of layer 2, ...], where the losses
    are means over the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = moe_layers(model)
        self.sizes = [layer.experts.num_experts for layer in self.layers.values()]

    def read(self, loss: Tensor, *, text_only: bool) -> Tensor:
        """[4 + sum N] float32. All but the loss is zero for a text-only batch, which routes nothing but a dummy."""
        if text_only or not self.layers:
            routing = loss.new_zeros(3 + sum(self.sizes), dtype=torch.float32)
            return torch.cat([loss.detach().float().view(1), routing])
        layers = self.layers.values()
        unknown = loss.new_full((), math.nan)  # the hyper router has no such losses
        losses = [
            _mean([layer.balance_loss for layer in layers], unknown),
            _mean([layer.z_loss for layer in layers], unknown),
        ]
        heads = torch.stack([loss.detach(), loss.new_ones(()), *losses]).float()
        return torch.cat([heads, *(layer.last_expert_share.float() for layer in layers)])

    def describe(self, sums: list[float], micro_batches: int) -> dict[str, Any]:
        """The log's entries for a step, from the sum of its micro-batches' vectors on all ranks."""
        loss, with_images, balance, z, *shares = sums
        routed = bool(self.layers) and with_images > 0
        entries: dict[str, Any] = {
            "loss": _number(loss / micro_batches),
            "balance_loss": _number(balance / with_images) if routed else None,
            "z_loss": _number(z / with_images) if routed else None,
            "expert_share": {},
        }
        for name, size in zip(self.layers, self.sizes, strict=True):
            if routed:
                entries["expert_share"][name] = [share / with_images for share in shares[:size]]
            shares = shares[size:]
        return entries

    @property
    def top_k(self) -> int | None:
        """K now; the hyper router's rises over the training."""
        routers = (layer.router for layer in self.layers.values())
        return next((getattr(router, "training_top_k", router.spec.top_k) for router in routers), None)


def _mean(values: list[Tensor | None], unknown: Tensor) -> Tensor:
    known = [value.to(unknown.dtype) for value in values if value is not None]
    return torch.stack(known).mean() if known else unknown


class StepLog:
    """Collects steps and writes them every log_every steps. Every rank makes one; rank 0 writes.

    Args:
        first_step: steps done before; later lines of an earlier, killed run are cut off.
        total_steps: of the whole run.
        micro_batches: per step, on all ranks together.
        skipped: bad samples so far.
        overflows: gradients may overflow now and then, and such steps are skipped (fp16's loss scale).
    """

    def __init__(
        self,
        config: RunConfig,
        statistics: Statistics,
        *,
        first_step: int,
        total_steps: int,
        micro_batches: int,
        skipped: Iterable[str],
        overflows: bool = False,
    ) -> None:
        self.overflows = overflows
        self.config, self.statistics = config, statistics
        self.total_steps, self.micro_batches = total_steps, micro_batches
        self.folder = Path(config.folder)
        self.skipped = dict.fromkeys(skipped)  # ordered, without repeats: samples come again in every epoch
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.writes = dist.get_rank() == 0
        if self.writes:
            self._open(first_step)
        self.restart_clock()

    def _open(self, first_step: int) -> None:
        from tqdm import tqdm

        self.file = self.folder / "log.jsonl"
        with disk_errors(str(self.file)):
            write_atomically(self.file, "".join(_lines_up_to(self.file, first_step)))
            self._list_skipped()
        self.bar = tqdm(total=self.total_steps, initial=first_step, desc=self.folder.name, unit="step")
        self.board = None
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = self.folder / "tensorboard"
            with disk_errors(str(board)):
                self.board = SummaryWriter(str(board), purge_step=first_step + 1)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self.bar.close()
            if self.board is not None:
                self.board.close()

    def restart_clock(self) -> None:
        """Leaves out of the step times what happened since the last write (saving a checkpoint)."""
        self.clock = time.perf_counter()

    def skip(self, lines: Iterable[str]) -> None:
        """Adds bad samples to the count and the list."""
        before = len(self.skipped)
        self.skipped.update(dict.fromkeys(lines))
        if self.writes and len(self.skipped) > before:
            with disk_errors(str(self.folder / "skipped_samples.txt")):
                self._list_skipped()

    def _list_skipped(self) -> None:
        if self.skipped:
            write_atomically(self.folder / "skipped_samples.txt", "".join(f"{line}\n" for line in self.skipped))

    def add(self, step: int, sums: Tensor, *, tokens: int, lr: float, grad_norm: Tensor | float) -> None:
        """Adds a step. `sums` adds up Statistics.read over this rank's micro-batches; `tokens` counts all ranks'."""
        entry = {
            "step": step,
            "total_steps": self.total_steps,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "skipped_samples": len(self.skipped),
            "top_k": self.statistics.top_k,
        }
        self.pending.append((entry, sums))
        if self.writes:
            self.bar.update()
        if len(self.pending) >= self.config.log_every:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending. All ranks must call it at the same step; only here the host waits for the device.

        Raises:
            DivergedError: on all ranks, a loss or a gradient was not finite. A checkpoint is saved after this only.
        """
        if not self.pending:
            return
        sums = torch.stack([sums for _, sums in self.pending])
        dist.all_reduce(sums)
        rows = sums.tolist()
        seconds = (time.perf_counter() - self.clock) / len(rows)
        for entry, _ in self.pending:
            entry["grad_norm"] = float(entry["grad_norm"])
        if self.writes:
            lines = [self._line(entry, row, seconds) for (entry, _), row in zip(self.pending, rows, strict=True)]
            with disk_errors(str(self.folder / "log.jsonl")):
                self._write(lines)
        steps = [
            (entry["step"], row[0], entry["grad_norm"]) for (entry, _), row in zip(self.pending, rows, strict=True)
        ]
        self.pending.clear()
        self.restart_clock()
        for step, loss, norm in steps:
            if not math.isfinite(loss):
                raise DivergedError(DIVERGED.format(what=f"the loss of step {step} is {loss}"))
            if not self.overflows and not (0 <= norm < math.inf):  # DeepSpeed says -1 for some that are not finite
                raise DivergedError(DIVERGED.format(what=f"the gradient of step {step} is not finite"))

    def _line(self, entry: dict[str, Any], row: list[float], seconds: float) -> dict[str, Any]:
        timing = {"step_seconds": seconds, "tokens_per_second": entry.pop("tokens") / seconds}
        norm = _number(entry["grad_norm"])  # not finite where fp16 overflowed: a skipped step
        return {**entry, "grad_norm": norm, **timing, **self.statistics.describe(row, self.micro_batches)}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with self.file.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if lines[-1]["loss"] is not None:
            self.bar.set_postfix(loss=f"{lines[-1]['loss']:.4f}", refresh=False)
        if self.board is None:
            return
        for line in lines:
            for name, value in _scalars(line):
                self.board.add_scalar(name, value, line["step"])
        self.board.flush()


def _lines_up_to(file: Path, step: int) -> list[str]:
    """The whole lines of log.jsonl up to a step."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    try:
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} has a line that this run did not write ({error}); move it away to go on"
        ) from error


def _scalars(line: dict[str, Any]) -> Iterable[tuple[str, float]]:
    names = ("loss", "balance_loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "top_k")
    for name in (*names, "skipped_samples"):
        if line[name] is not None:
            yield f"train/{name}", line[name]
    for layer, shares in line["expert_share"].items():
        for expert, share in enumerate(shares):
            yield f"expert_share/{layer}/{expert}", share


def _number(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else None
