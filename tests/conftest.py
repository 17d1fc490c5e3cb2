"""Shared fixtures: small data and models, built once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads only slow these sizes down
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download anything fails at once instead

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """40 digits, 9 of them held out: an odd number, so that two ranks get unequal shares."""
    from libmoe_fast.train.digits import write_digits

    return write_digits(tmp_path_factory.mktemp("digits") / "data", held_out=9, limit=40)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder with dense/final and smoe/final: one tiny LLaVA, and the same upcycled."""
    from libmoe_fast import save_model, upcycle
    from libmoe_fast.train.digits import VOCAB_TEXTS
    from libmoe_fast.train.tiny import tiny_llava

    folder = tmp_path_factory.mktemp("runs")
    model, processor = tiny_llava("clip", vocab_texts=VOCAB_TEXTS)
    save_model(model, folder / "dense" / "final", processor=processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upcycle(model, router="smoe", num_experts=4, top_k=2)
    save_model(model, folder / "smoe" / "final", processor=processor)
    return folder
