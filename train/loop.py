"""The training loop: one stage, from its config to final/."""

from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import Tensor

from libmoe_fast.checkpoint import whole_state
from libmoe_fast.errors import LibMoEError
from libmoe_fast.train.config import TrainConfig, check
from libmoe_fast.train.data import Batch, ConversationDataset, batches, make_collator, open_records
from libmoe_fast.train.engine import (
    collect_from_ranks,
    from_first_rank,
    learning_rate,
    make_engine,
    model_inputs,
    set_learning_rate,
    start_processes,
    step_engine,
    sum_over_ranks,
)
from libmoe_fast.train.held_out import HeldOut, held_out_data
from libmoe_fast.train.log import Statistics, StepLog
from libmoe_fast.train.model import DTYPES, build_model, image_tokens, settle_format
from libmoe_fast.train.records import Records
from libmoe_fast.train.sampler import ModalityLengthSampler, steps_per_epoch
from libmoe_fast.train.state import RunFolder, disk_errors, seed_everything
from libmoe_fast.train.stop import StopSignal
from libmoe_fast.upcycle import aux_loss_disabled, scale_aux_loss, set_training_progress


def train(config: TrainConfig) -> None:
    """Trains one stage and writes run.folder/final; goes on from the last checkpoint if there is one.

    Ctrl-C (and SIGTERM) finishes the step, saves and raises KeyboardInterrupt; a second one stops at once.

    Raises:
        ConfigError, DataError, CheckpointError: see their docstrings; nothing saved before is lost.
    """
    check(config)
    start_processes()
    with RunFolder(config) as run:
        if run.done:
            _say(f"{run.path} is done already: the trained model is in {run.final}")
        else:
            _train(config, run)


def _train(config: TrainConfig, run: RunFolder) -> None:
    records = _records(config, run)  # before the model: what is wrong with them is known in seconds
    held_out_records = None if config.data.held_out is None else open_records(held_out_data(config))
    seed_everything(config.run.seed)  # the same new weights on every rank
    model, processor = build_model(config.model, dtype=DTYPES[config.engine.dtype])
    config = settle_format(config, model, processor)
    tokens = image_tokens(model)
    dataset = ConversationDataset(
        config.data, processor, image_tokens=tokens, template=config.model.chat_template, records=records
    )
    run.check_inputs()
    steps = _total_steps(config, dataset)
    engine = make_engine(model, config, universal=run.join_parts())
    seed_everything(config.run.seed + dist.get_rank())  # but noise of its own
    progress = run.restore(engine)
    first_step = progress.get("step", 0)
    collator = make_collator(processor, tokens)
    stream = batches(dataset, _sampler(config, dataset, first_step, steps), collator)
    held_out = None
    if held_out_records is not None:
        held_out = HeldOut(
            config, processor, collator, image_tokens=tokens, records=held_out_records, first_step=first_step
        )
    log = StepLog(
        config.run,
        Statistics(model),
        first_step=first_step,
        total_steps=steps,
        micro_batches=config.optim.accumulation * dist.get_world_size(),
        skipped=progress.get("skipped", dataset.skipped),
        overflows=config.engine.dtype == "fp16",
    )
    exports = {round(share * steps) for share in config.run.export_at} - {0}
    set_training_progress(model, first_step, steps)
    with log, StopSignal() as stop:
        for step in range(first_step, steps):
            stopping = _step(engine, list(islice(stream, config.optim.accumulation)), step, steps, config, log, stop)
            done = step + 1
            if stopping or done == steps or done % config.run.save_every == 0:
                log.flush()
                run.save(engine, done, {"skipped": list(log.skipped)})
                log.restart_clock()
            if done in exports and done < steps:
                log.flush()
                run.export(engine.module, processor, whole_state(engine.module), step=done)
                log.restart_clock()
            if held_out is not None and (done in exports or done == steps):
                log.flush()
                held_out.measure(engine, done)
                _say(f"{run.path}: {held_out}")
                log.restart_clock()
                if held_out.exhausted and done < steps:
                    _say(f"{run.path}: stopped after step {done} of {steps}, as run.patience says")
                    break
            if stopping and done < steps:
                raise KeyboardInterrupt(f"stopped and saved after step {done} of {steps}; the same command goes on")
    run.export(engine.module, processor, whole_state(engine.module))
    _say(f"{run.path} is done: the trained model is in {run.final}")


def _records(config: TrainConfig, run: RunFolder) -> Records:
    """Read and checked by the first process, and mapped by all. All ranks raise what the first one found wrong."""
    outcome: Any = None
    if dist.get_rank() == 0:
        try:
            with disk_errors(str(run.records)):
                outcome = open_records(config.data, table=run.records)
            _say(f"{config.data.file}: {outcome}")
        except LibMoEError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, LibMoEError):
        raise outcome
    return outcome


def _step(
    engine: Any, micro_batches: list[Batch], step: int, steps: int, config: TrainConfig, log: StepLog, stop: StopSignal
) -> bool:
    """One optimizer step. Returns whether any rank was asked to stop."""
    labels, tokens, skipped, stopping = sum_over_ranks(
        [
            sum(batch.labels for batch in micro_batches),
            sum(batch.tokens for batch in micro_batches),
            sum(len(batch.skipped) for batch in micro_batches),
            int(stop.asked),
        ]
    )
    if skipped:
        log.skip(collect_from_ranks([line for batch in micro_batches for line in batch.skipped]))
    optim = config.optim
    lr = learning_rate(step, peak=optim.lr, steps=steps, warmup_ratio=optim.warmup_ratio)
    set_learning_rate(engine, lr)
    labels_each = labels / (optim.accumulation * dist.get_world_size())
    sums, grad_norm = 0, None
    for batch in micro_batches:
        sums = sums + _micro_step(engine, batch, labels_each, log.statistics)
        grad_norm = step_engine(engine)
    log.add(step + 1, sums, tokens=tokens, lr=lr, grad_norm=grad_norm)
    # Here, not before the next step: what routers have counted in this one is in no checkpoint.
    set_training_progress(engine.module, step + 1, steps)
    return bool(stopping)


def _micro_step(engine: Any, batch: Batch, labels_each: float, statistics: Statistics) -> Tensor:
    """Forward and backward of one micro-batch; returns its statistics.

    The loss is the sum over the batch's labels divided by the mean number of labels of all micro-batches of the step:
    every label of the global batch weighs the same, however the batch is cut into ranks and micro-batches.
    """
    # A text-only batch sees a dummy image, whose routing must not be balanced. Backward belongs inside: it recomputes.
    with aux_loss_disabled(engine.module) if batch.text_only else nullcontext():
        inputs = model_inputs(engine, batch.inputs)
        loss = scale_aux_loss(engine(**inputs, num_items_in_batch=labels_each, use_cache=False).loss)
        engine.backward(loss)
    return statistics.read(loss, text_only=batch.text_only)


def _total_steps(config: TrainConfig, dataset: ConversationDataset) -> int:
    global_batch = config.optim.batch_size * config.optim.accumulation * dist.get_world_size()
    return config.optim.max_steps or config.optim.epochs * steps_per_epoch(dataset.has_image, global_batch)


def _sampler(config: TrainConfig, dataset: ConversationDataset, first_step: int, steps: int) -> ModalityLengthSampler:
    return ModalityLengthSampler(
        dataset.lengths,
        dataset.has_image,
        batch_size=config.optim.batch_size,
        accumulation=config.optim.accumulation,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        seed=config.run.seed,
        steps=steps,
        first_step=first_step,
        megabatch=config.data.megabatch,
    )


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
