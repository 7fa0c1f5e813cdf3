"""x"""
from __future__ import annotations
from neox_native.config.schema import Config
def num_microbatches(config: Config) -> int:
    t=config.training
    return t.global_batch_size // (t.micro_batch_size * config.parallel.dp)
def model_flops_of_rank(config, pp_rank): return 0
