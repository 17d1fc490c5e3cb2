"""Kernels compiled for a GPU that is not here: found again where the cache was carried to, and only those."""

import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from libmoe_fast.kernels import cache
from libmoe_fast.kernels.aot import jobs
from libmoe_fast.kernels.shapes import Shape

TINY = Shape(name="tiny", T=24, D=32, H=64, O=32, N=4, K=2)


def some_jobs(kernels=("down", "permute"), operands="bf16"):
    found = jobs(["sm90"], [TINY], [operands], first_tile=True)
    return [next(job for job in found if job.kernel == name) for name in kernels]


def test_a_carried_cache_is_found(tmp_path):
    """Triton writes absolute paths into it."""
    here, there = tmp_path / "here", tmp_path / "there"
    assert list(cache.fill(here, some_jobs())) == ["", ""]
    assert len(cache.compiled_kernels(here)) == 2
    shutil.move(here, there)
    carried = cache.settle(there)
    assert list(cache.fill(there, some_jobs())) == ["", ""]
    assert cache.compiled_kernels(there) == carried  # nothing was compiled again
    assert list(cache.fill(there, some_jobs(operands="fp16"))) == ["", ""]
    assert len(cache.compiled_kernels(there)) == 3  # the permutation knows no dtype


def test_what_a_launch_does_not_read_is_left_out(tmp_path):
    list(cache.fill(tmp_path, some_jobs()))
    assert {file.suffix for file in tmp_path.glob("*/*")} == {".cubin", ".json"}


def test_a_compilers_complaint_is_told(tmp_path):
    (job, _) = some_jobs()
    (complaint,) = cache.fill(tmp_path, [replace(job, constants=job.constants | {"BM": 48})])
    assert complaint.startswith(f"down {job.tile} tiny bf16: ")


def test_arguments_are_specialised_as_on_the_gpu():
    """Beside a launch's own arguments: the same kernel for the same types, ones and multiples of 16."""
    (job, _) = some_jobs()
    values = {name: cache.argument(job, name, kind) for name, kind in job.signature.items()}
    assert values["H"] % 16 == 0
    assert values["rows_log2"] % 16 != 0
    assert values["y_ptr"].dtype == torch.bfloat16
    assert values["w2"].block_shape == [1, job.constants["BN"], job.constants["BK"]]
