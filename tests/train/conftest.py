"""What tiny runs start from and are trained on, made once per file."""

import pytest
from tiny_runs import write_data, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("images"), images=24, texts=0)
