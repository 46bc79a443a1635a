"""verl on the CPU, in this process and in Ray's workers: set before verl is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ.update(
    PYTHONPATH=os.pathsep.join(PATHS),
    VERL_PLATFORM="cpu",
    VERL_USE_EXTERNAL_MODULES="cpu_platform",
    VERL_ENGINE_VENDOR="mem1",
    OMP_NUM_THREADS="1",
    HYDRA_FULL_ERROR="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS="0",
    RAY_memory_monitor_refresh_ms="0",
)

import pytest  # noqa: E402
import ray  # noqa: E402
import verl  # noqa: E402, F401

from configs import make_model  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its data."""
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray with two logical devices, for all trainers: it takes longer to start than they train.

    Yields the folder of the trainers' logs.
    """
    logs = tmp_path_factory.mktemp("logs")
    ray.init(
        num_gpus=2,
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
        runtime_env={"env_vars": {"VERL_FILE_LOGGER_ROOT": str(logs)}},
    )
    yield logs
    ray.shutdown()
