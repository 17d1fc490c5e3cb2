"""What a file as large as LLaVA-665K costs a training process before its first step.

    python benchmarks/records.py [--records 665298] [--processes 4]

Writes such a file (conversations of LLaVA's length, one small image for all), reads it in a process of its own as
training does, and lets others map what that has made. Prints seconds, CPU seconds and memory.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORDS = 665_298  # LLaVA-v1.5-mix665k
CHARACTERS = 1_560  # of its conversations on average: 1.03 GB of JSON
READ = 2_000  # records that a process draws at random, as a sampler does
WORDS = ("the", "red", "car", "stands", "beside", "two", "people", "who", "look", "at", "it", "from", "a", "street")


def write(folder: Path, records: int) -> Path:
    """A JSON list of conversations of two to ten turns, nine of ten about an image."""
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "image.png")
    words = random.Random(0)
    with (folder / "records.json").open("w") as file:
        for number in range(records):
            turns = words.randint(1, 5)
            each = max(1, CHARACTERS // (turns * 2 * 5))  # words, of five characters with their blank
            texts = [" ".join(words.choices(WORDS, k=each)) for _ in range(2 * turns)]
            about = {"image": "image.png"} if number % 10 else {}
            texts[0] = "<image>\n" + texts[0] if about else texts[0]
            conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            file.write(
                ("[" if number == 0 else ",\n")
                + json.dumps({"id": str(number), **about, "conversations": conversation})
            )
        file.write("]\n")
    return folder / "records.json"


def private_mb() -> float:
    """Memory that is this process's alone, in MB. Pages of a mapped file are the system's, which shares them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1e3


def peak_mb() -> float:
    """The most memory that this process has had at once, mapped files among it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def read(file: Path, processes: int) -> dict:
    """In a fresh process: as the first process of a training does, and then as the others."""
    from libmoe_fast.train.config import DataConfig
    from libmoe_fast.train.data import open_records
    from libmoe_fast.train.sampler import ModalityLengthSampler

    first_peak = peak_mb()
    before, started, cpu = private_mb(), time.perf_counter(), time.process_time()
    records = open_records(DataConfig(file=str(file)), table=file.parent / "records.arrow").good
    found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    peak = peak_mb()
    sizes = {"batch_size": 8, "accumulation": 1, "world_size": 8, "rank": 0, "seed": 0}
    started = time.perf_counter()
    steps = max(1, len(records) // 64)
    first = next(iter(ModalityLengthSampler(records.lengths, records.has_image, **sizes, steps=steps)))
    found |= {"sampler": time.perf_counter() - started, "private": private_mb() - before}
    found |= {"peak": peak, "before": first_peak}
    assert len(first) == 8
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found["others"] = max(pool.map(draw, [records] * processes))
    return found


def draw(records) -> float:
    """What reading at random adds to a process's own memory, in MB."""
    before = private_mb()
    numbers = random.Random(os.getpid())
    assert all(records[numbers.randrange(len(records))]["conversations"] for _ in range(READ))
    return private_mb() - before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/records.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--records", type=int, default=RECORDS, help="as many as LLaVA-665K has (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="that map the records beside (%(default)s)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the file, in the fresh process
    options = parser.parse_args(arguments)
    if options.read is not None:
        print(json.dumps(read(options.read, options.processes)))
        return 0
    with tempfile.TemporaryDirectory(prefix="libmoe_fast-records-") as folder:
        file = write(Path(folder), options.records)
        command = [sys.executable, __file__, "--read", file, "--processes", str(options.processes)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        size = file.stat().st_size / 1e9
    rows = {
        "read and checked by the first process": f"{found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU",
        "sorted by length and modality": f"{found['sampler']:.1f} s",
        "memory of the first process, at most": f"{found['peak']:.0f} MB, {found['before']:.0f} before it read",
        "what it keeps of its own": f"{found['private']:.0f} MB",
        f"of each other process, {READ:,} records drawn": f"{found['others']:.0f} MB",
    }
    print(f"{options.records:,} records, {size:.2f} GB of JSON")
    for what, value in rows.items():
        print(f"{what:<50} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
