"""A run's folder: its config, its checkpoints, going on from the last one, and its outcome.

    folder/config.yaml            what the run was started with
    folder/inputs.json            fingerprints of the data and the weights that it started from; samples per step
    folder/checkpoints/latest     name of the newest whole checkpoint
    folder/checkpoints/step-N/    DeepSpeed's state, and rank-R.pt with that process's random state
    folder/records.arrow          the records while they are used: made at every start, mapped by all processes
    folder/exports/step-N/        the model after N steps, to be evaluated (run.export_at)
    folder/final/                 the trained model; there once the run is done

Nothing half-written ever carries a final name: files are written under a temporary name, flushed to the disk and
renamed, so a run killed at any moment finds its last whole checkpoint.
"""

import errno
import fcntl
import hashlib
import json
import random
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from libmoe_fast.analysis.results import EXPORTS
from libmoe_fast.checkpoint import save_model
from libmoe_fast.errors import CheckpointError, ConfigError
from libmoe_fast.files import sync, sync_tree, write_atomically
from libmoe_fast.train.chat import TEMPLATES
from libmoe_fast.train.config import FROM_HERE_ON, HARMLESS, TrainConfig, flatten, plain
from libmoe_fast.train.engine import collect_from_ranks, from_first_rank
from libmoe_fast.train.universal import convert, load_buffers

SEEN = ".seen.partial"  # there while a run starts; one that a killed run left is removed like all that is half-written
WEIGHTS_SAMPLED = 256, 1 << 16  # blocks per file of weights, bytes per block
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what locking says there
# torch's zip writer reports a full disk as a RuntimeError with one of these.
TORCH_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")


class RunFolder:
    """A run's folder, held by this run alone while the context is open.

    Raises:
        ConfigError: the folder belongs to a run with other options, or another process is training in it.
        CheckpointError: something in it cannot be read or written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.run.folder)
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.records = self.path / "records.arrow"
        self.whole: Path | None = None  # the latest checkpoint, uncut; see join_parts

    def __enter__(self) -> "RunFolder":
        if dist.get_rank() == 0:
            with disk_errors(f"the run's folder {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = (self.path / ".lock").open("w")
            self._claim()
            write_atomically(self.path / SEEN, uuid.uuid4().hex)
        dist.barrier()
        self._check_shared()
        return self

    def _check_shared(self) -> None:
        """Checkpoints are written by all processes and read by all: a folder per node would be found out at resume."""
        file = self.path / SEEN
        seen = collect_from_ranks([file.read_text() if file.is_file() else ""])
        if dist.get_rank() == 0:
            file.unlink()
        if missing := [rank for rank, token in enumerate(seen) if token != seen[0]]:
            raise ConfigError(
                f"processes {', '.join(map(str, missing))} do not see the run's folder {self.path} of process 0; "
                "run.folder must lie on a disk that all nodes share"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if dist.get_rank() == 0:
            self._lock.close()

    @property
    def done(self) -> bool:
        return self.final.exists()

    def _claim(self) -> None:
        try:
            # A record lock: gone with its process, however that ends, and not inherited by data workers.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process trains in {self.path}; wait, or choose another run.folder") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.path} has no locks ({error.strerror}): nothing keeps a second run out of it",
                stacklevel=2,
            )
        if self.final.exists() and not self.final.is_dir():
            raise ConfigError(f"{self.final} is a file, but the trained model goes there; choose another run.folder")
        for partial in [*self.checkpoints.glob(".*.partial"), *self.path.glob(".*.partial")]:
            _remove(partial)
        file = self.path / "config.yaml"
        if not file.exists():
            with disk_errors(str(file)):
                write_atomically(file, yaml.safe_dump(plain(self.config), sort_keys=False))
            return
        try:
            before = flatten(yaml.safe_load(file.read_text()))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{file} is empty or damaged ({type(error).__name__}); choose another run.folder, or delete the file "
                "if the run was started with these very options"
            ) from error
        now = flatten(plain(self.config))
        changed = [key for key in now if now[key] != before.get(key) and key not in HARMLESS]
        from_here_on = [key for key in changed if key in FROM_HERE_ON and now[key] == FROM_HERE_ON[key]]
        for key in from_here_on:
            print(f"{self.path}: {key} was {before.get(key)!r}, and is {now[key]!r} from here on", flush=True)
        changed = [key for key in changed if key not in from_here_on]
        if set(changed) <= CUT and self._stored_inputs().get(PER_STEP) == samples_per_step(self.config):
            changed = []  # another number of processes: the same samples make each step
        if changed:
            listing = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
            raise ConfigError(f"{self.path} belongs to a run with other options: {listing}; choose another run.folder")

    def check_inputs(self) -> None:
        """Refuses to go on from a checkpoint on other data or other starting weights than it was made from.

        All ranks may call it; the first one reads. Call it once the inputs are known to be readable.
        """
        if dist.get_rank() > 0 or self.done:
            return
        file, now = self.path / "inputs.json", fingerprints(self.config) | {PER_STEP: samples_per_step(self.config)}
        if (self.checkpoints / "latest").exists() and file.exists():
            before = self._stored_inputs()
            if changed := [name for name in now if name in before and now[name] != before[name]]:
                raise ConfigError(
                    f"{', '.join(changed)} changed since the run in {self.path} started; put back what it was, or "
                    "choose another run.folder"
                )
        with disk_errors(str(file)):
            write_atomically(file, json.dumps(now, indent=1))

    def _stored_inputs(self) -> dict[str, Any]:
        file = self.path / "inputs.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def join_parts(self) -> bool:
        """Whether the latest checkpoint was written by another number of processes; its parts are then put together
        for the engine, which has to know before it is made. All ranks must call it.
        """
        latest = self.checkpoints / "latest"
        if not latest.exists() or self.config.engine.zero_stage == 0:  # nothing is cut there
            return False
        checkpoint = self.checkpoints / latest.read_text().strip()
        processes = len(list(checkpoint.glob("rank-*.pt")))
        if processes in (0, dist.get_world_size()):
            return False
        if self.config.engine.expert_parallel > 1:
            raise ConfigError(
                f"{checkpoint} was written by {processes} processes with engine.expert_parallel, and can be taken up "
                f"by as many only; here are {dist.get_world_size()}"
            )
        self.whole = self.checkpoints / f".{checkpoint.name}.whole.partial"
        failure = None
        if dist.get_rank() == 0:
            print(f"{checkpoint} was written by {processes} processes, and is cut anew for {dist.get_world_size()}")
            try:
                with disk_errors(str(self.whole), partial=self.whole):
                    convert(checkpoint, self.whole)
            except CheckpointError as error:
                failure = error
        if failure := from_first_rank(failure):
            raise failure
        return True

    def save(self, engine: Any, step: int, progress: dict[str, Any]) -> None:
        """Writes checkpoint step-N, makes it the latest, and removes old ones. All ranks must call it.

        Args:
            step: optimizer steps done.
            progress: anything else that restore should give back; rank 0's is kept.
        """
        partial, whole = self.checkpoints / f".step-{step}.partial", self.checkpoints / f"step-{step}"
        state = {**progress, "step": step}
        with disk_errors(f"checkpoint {whole}", partial=partial):
            engine.save_checkpoint(str(self.checkpoints), tag=partial.name, client_state=state, save_latest=False)
            torch.save(random_state(), partial / f"rank-{dist.get_rank()}.pt")
            dist.barrier()
            if dist.get_rank() == 0:
                _remove(whole)  # one that a run saved and was killed before it became the latest
                publish(partial, whole)
                write_atomically(self.checkpoints / "latest", whole.name)
                self._prune(step)
        dist.barrier()

    def _prune(self, latest: int) -> None:
        steps = sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))
        kept = [step for step in steps if step <= latest][-self.config.run.keep_checkpoints :]
        for step in set(steps).difference(kept):  # later ones come from a run that was killed before they counted
            _remove(self.checkpoints / f"step-{step}")

    def restore(self, engine: Any) -> dict[str, Any]:
        """Puts engine and random state back to the latest checkpoint; returns what save was given, {} if none."""
        latest = self.checkpoints / "latest"
        if not latest.exists():
            return {}
        folder = self.checkpoints / latest.read_text().strip()
        try:
            _check_stored_sums(sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()])
            _, state = engine.load_checkpoint(str(self.checkpoints), tag=(self.whole or folder).name)
            if len(list(folder.glob("rank-*.pt"))) == dist.get_world_size():
                set_random_state(torch.load(folder / f"rank-{dist.get_rank()}.pt", weights_only=True))
            else:  # nobody's state can be shared out: noise is new
                seed_everything((self.config.run.seed + 2**16 * state["step"] + dist.get_rank()) % 2**32)
            if self.whole is not None:
                load_buffers(engine.module, self.whole)
            if self.config.engine.expert_parallel > 1:
                engine.optimizer.update_lp_params()  # a model's file has the first process's experts only
        # torch, zip and DeepSpeed raise errors of no common kind on damaged files.
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be read: {error}; to go on from an older one, write its name into {latest}"
            ) from error
        dist.barrier()
        if self.whole is not None and dist.get_rank() == 0:
            _remove(self.whole)
        return state

    def export(self, model: nn.Module, processor: Any, state: dict[str, Tensor], *, step: int | None = None) -> None:
        """Writes final/, what the next stage, evaluation and users load, and marks the run as done. All ranks call it.

        Args:
            state: the whole weights, on rank 0.
            step: write exports/step-N/ instead, in the middle of training.
        """
        if dist.get_rank() == 0:
            folder = self.final if step is None else self.path / EXPORTS / f"step-{step}"
            save_model(model, folder, processor=processor, state_dict=state)
            if step is None:
                self.records.unlink(missing_ok=True)
                if self.config.run.delete_checkpoints_when_done:
                    _remove(self.checkpoints)
        dist.barrier()


def _check_stored_sums(files: list[Path]) -> None:
    """torch stores a CRC-32 of every tensor and reads past a wrong one; zipfile does not."""
    for path in files:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"{path.name} is damaged: the checksum of {damaged} is wrong")


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Of what a run reads before its first step: the records, the chat formats, and the weights it starts from."""
    model = config.model
    formats = json.dumps({name: template.jinja for name, template in TEMPLATES.items()})
    found = {
        "data.file": _digest(Path(config.data.file), sampled=False),
        "the chat formats of libmoe_fast": hashlib.sha256(formats.encode()).hexdigest(),
    }
    for name in ("path", "vision_tower", "language_model"):
        if (folder := getattr(model, name)) is not None:
            weights = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
            found[f"the weights of model.{name}"] = " ".join(_digest(file, sampled=True) for file in weights)
    return found


PER_STEP = "samples per step"  # in inputs.json
CUT = {"optim.batch_size", "optim.accumulation"}  # how they are cut into forward passes


def samples_per_step(config: TrainConfig) -> int:
    return config.optim.batch_size * config.optim.accumulation * dist.get_world_size()


def _digest(path: Path, *, sampled: bool) -> str:
    """SHA-256 of a file, or of its size and evenly spaced blocks: training changes weights everywhere."""
    blocks, length = WEIGHTS_SAMPLED
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if sampled and size > blocks * length:
            for block in range(blocks):
                file.seek((size - length) * block // (blocks - 1))
                digest.update(file.read(length))
        else:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


@contextmanager
def disk_errors(what: str, *, partial: Path | None = None) -> Iterator[None]:
    """Turns errors of writing, a full disk above all, into a CheckpointError, and removes what is half-written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(mark in str(error) for mark in TORCH_WRITE_ERRORS):
            raise
        if partial is not None:
            _remove(partial)
        reason = error.strerror if isinstance(error, OSError) else "writing failed, as it does on a full disk"
        raise CheckpointError(
            f"{what} cannot be written: {reason}; what was saved before is unharmed: make room and run the same command"
        ) from error


def publish(partial: Path, whole: Path) -> None:
    """Gives a folder its final name once all of it is on the disk."""
    sync_tree(partial)
    partial.rename(whole)
    sync(whole.parent)


def _remove(path: Path) -> None:
    # Renamed first: a folder half removed must not carry a checkpoint's name.
    if path.is_dir():
        doomed = path.with_name(f".{path.name.strip('.')}.removed.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # GPUs included


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, torch and this process's GPU, in types that torch.load takes without trusting the file."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
