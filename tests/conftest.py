"""Settings of the whole suite: one thread per process, since forked ranks share few cores (and OpenMP does not survive a fork)."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch

torch.set_num_threads(1)
