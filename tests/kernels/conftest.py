"""Tests of the Triton kernels. They are the same on both, each in a process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels     in Triton's interpreter, on the CPU
    pytest tests/kernels                        on the GPU

Interpreted and compiled kernels cannot share a process: the variable is read when triton is imported. Without it and
without a GPU everything here is skipped (kernel_checks.py).
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _float32_is_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
