"""The order of training: batches of one modality and similar length, the same for every number of processes."""

from collections.abc import Iterator, Sequence

import numpy
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[list[int]]):
    """Micro-batches of one process, epoch after epoch, from any micro-step on.

    An epoch is cut into global batches (what one optimizer step sees). All samples of a global batch have, or lack, an
    image, except in the last ones, which collect what is left over; the last one is filled up with samples of the
    same epoch. Batches that are sorted together hold similar lengths, so little is padded. The order depends on
    (seed, epoch) and the global batch alone, never on how many processes share it.

    Args:
        lengths: a length per sample, in any unit.
        has_image: a flag per sample.
        batch_size: samples per process and micro-step.
        accumulation: micro-steps per optimizer step.
        world_size, rank: this process among all.
        steps: optimizer steps in all; as many epochs as they take.
        first_step: optimizer step to begin with (a resumed run).
        megabatch: global batches sorted by length together.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        *,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        steps: int,
        first_step: int = 0,
        megabatch: int = 1,
    ) -> None:
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.accumulation = batch_size, accumulation
        self.world_size, self.rank = world_size, rank
        self.seed, self.steps, self.first_step, self.megabatch = seed, steps, first_step, megabatch

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = steps_per_epoch(self.has_image, self._global_batch)
        epoch, batches = -1, []
        for step in range(self.first_step, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = self.epoch_batches(epoch)
            yield from self._share(batches[step % per_epoch])

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch, each sorted by length, longest first."""
        generator = numpy.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths)).tolist()
        batches, left = [], []
        for modality in (True, False):
            samples = [sample for sample in order if bool(self.has_image[sample]) is modality]
            full = len(samples) - len(samples) % self._global_batch
            batches += self._cut(samples[:full])
            left += samples[full:]
        if left:
            missing = -len(left) % self._global_batch
            left += (order * (missing // len(order) + 1))[:missing]
            batches += self._cut(left)
        return [batches[i] for i in generator.permutation(len(batches))]

    def _cut(self, samples: list[int]) -> list[list[int]]:
        size, batches = self._global_batch, []
        for start in range(0, len(samples), self.megabatch * size):
            window = sorted(samples[start : start + self.megabatch * size], key=lambda i: -self.lengths[i])
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        return batches

    def _share(self, batch: list[int]) -> Iterator[list[int]]:
        # Processes take every world_size-th sample of a micro-step, so that all have about as much to do.
        size = self.batch_size * self.world_size
        for start in range(0, len(batch), size):
            yield batch[start + self.rank : start + size : self.world_size]


def steps_per_epoch(has_image: Sequence[bool], global_batch: int) -> int:
    """Optimizer steps that ModalityLengthSampler makes of one epoch."""
    images = sum(map(bool, has_image))
    texts = len(has_image) - images
    left = images % global_batch + texts % global_batch
    return images // global_batch + texts // global_batch + -(-left // global_batch)
