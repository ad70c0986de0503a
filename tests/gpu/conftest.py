"""The devices: a test that takes `device` runs on the CPU too, one that takes `card` on CUDA alone.

A machine with a card may have torch, the core's other dependency, smp and timm beside pytest and Hypothesis, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before CUDA starts: without it torch takes no matrix product for deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[CUDA])
def card(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Sums in one order, as the equality of bits needs; what torch has no such kernel for, it warns of."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a card torch warns of its own affairs, of which a version may know more: the library's warnings alone fail."""
    if item.get_closest_marker("gpu"):
        own = "error:(`|no gradient reached):UserWarning", "ignore:`learning_rate_scale` should be below 1"
        item.add_marker(pytest.mark.filterwarnings("default", *own))
