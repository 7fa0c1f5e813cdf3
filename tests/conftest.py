"""Settings of the whole suite: one thread per process, since forked ranks share few cores (and OpenMP does not survive a fork), and
GPUs counted without a start of CUDA, which would not survive one either."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu(n)` need n GPUs. Asked for alone where there is none, they are refused in a sentence."""
    there_are = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.option.markexpr == "gpu" and not there_are:
        raise pytest.UsageError(f"-m gpu needs a GPU, and torch {torch.__version__} sees none here; all other tests run on a CPU.")
    for item in items:
        if (mark := item.get_closest_marker("gpu")) and there_are < (needed := (mark.args or (1,))[0]):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), and torch sees {there_are}"))
