"""What holds for every test: threads, Ray's and the hub's switches, hypothesis profiles, `--soak`.

The environment is set at import, before torch or ray is loaded here, and Ray workers inherit it.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# For tiny tensors two threads that wait for each other cost more than they do: on a busy machine
# tests/oracle/test_wan.py took 75 s with two and 10 s with one.
NUM_THREADS = 1
os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)
os.environ["MKL_NUM_THREADS"] = str(NUM_THREADS)
# Unset, Ray 2.60 uses a token if one lies in the home folder: tests would depend on the machine.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "torch" in sys.modules:  # a plugin was faster; the variables above came too late for it
    sys.modules["torch"].set_num_threads(NUM_THREADS)

settings.register_profile("test", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile(
    "soak",
    deadline=None,
    max_examples=1000,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long suites in full")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("soak" if config.getoption("--soak") else "test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="a long suite: `make soak` or pytest --soak runs it")
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model, whole; copy it before changing it."""
    from tests.tiny_models import write_model  # diffusers takes seconds: only for who asks

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A worker in this process has set its own number of threads: set it back."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(NUM_THREADS)
