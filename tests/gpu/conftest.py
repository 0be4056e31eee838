"""These tests need a CUDA device and are skipped without one. Models are the engine tests' small random ones."""

import pytest
import torch

from tests.engine import conftest as engine

make_model = engine.make_model
make_engine = engine.make_engine


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
