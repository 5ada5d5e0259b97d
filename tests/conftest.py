"""One thread, one seed, and the Hypothesis profiles: `ci` by default, `thorough` by HYPOTHESIS_PROFILE=thorough."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on a CPU

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_itemcollected(item):
    """Most laws hold at any threshold, so tests may leave it unset. Documents may not: marks are of tests alone."""
    item.add_marker(pytest.mark.filterwarnings("ignore:the threshold of BatchTopK.* was never set:UserWarning"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
