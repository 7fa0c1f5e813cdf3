"""The types of weights and activations, by the names that the settings give them."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ELEMENT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
FP32_BYTES, INT64_BYTES = torch.float32.itemsize, torch.int64.itemsize
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Their names in safetensors files."""
