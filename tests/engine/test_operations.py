"""How many kernels a GPU starts for a block and for an update. The numbers are pinned: who changes one has meant to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox_native.config.check import require
from neox_native.config.schema import Config, Model, Parallel, Training
from neox_native.mesh import build_mesh
from neox_native.plan.dry_run import fake_process_group, fake_step
from tests.fake_cuda import CUDA, fake_cuda, no_waits

NO_KERNEL = {"device", "_unsafe_view", "_record_function_enter_new", "_record_function_exit"}
FORWARD = Counter(
    native_layer_norm=1,  # x̂, which both branches share
    addcmul=2,  # an affine half for each branch
    addmm=2,  # queries, keys and values; the first feed-forward product
    mul=4, neg=2, cat=4, add=2 + 4,  # rotary embedding of queries and keys; the branches' sum, its two biases, the residual
    gelu=1,
    mm=2,  # output projections
)  # fmt: skip
"""Of Pythia's block, in any precision but for attention's one and conversions."""
ROTARY_IN_FP32 = Counter(_to_copy=4)
BACKWARD = Counter(
    mm=8,  # four products, each for its input and for its weight
    sum=4 + 4,  # biases; the affine halves' weights and biases
    copy_=12,  # gradients into the unit's fp32 matrix, which the first microbatch need not clear
    native_layer_norm_backward=1,
    gelu_backward=1,
    mul=4 + 4 + 4, neg=2, cat=2, add=8, slice_backward=5, select_backward=2,  # affine halves, rotary, joins
)  # fmt: skip
UPDATE = Counter(
    _foreach_norm=1, linalg_vector_norm=1, stack=1, _to_copy=3, pow=1, div=2, add=2, mul=1, sqrt=1, zeros=1,  # the norm
    abs=1, eq=1, ne=1, rsub=1, clamp=1,  # whether it is finite, and what to clip by
    _fused_adamw_=2, _foreach_add_=2, _foreach_sub_=2,  # what decays and what does not, the numbers of updates with a step skipped
)  # fmt: skip
"""Of any number of parameters. The rate is a number; the kernel unscales, clips and skips."""


class Operations(TorchDispatchMode):
    """Counts operations that start a kernel: no views, and no look at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        name = function._overloadpacket.__name__
        if not function.is_view and name not in NO_KERNEL:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision, num_layers", [("bf16", 1), ("fp16", 3), ("fp32", 1)])
def test_a_block_and_an_update_start_so_many_kernels(precision: str, num_layers: int) -> None:
    model = Model(num_layers=num_layers, hidden_size=32, num_heads=4, seq_length=16, vocab_size=64)
    training = Training(global_batch_size=1, micro_batch_size=1, precision=precision)
    config = require(Config(model=model, training=training, parallel=Parallel(dp=1)), 1)
    forward, backward, update = Operations(), Operations(), Operations()
    with fake_cuda(), fake_process_group(0, 1):
        mesh = build_mesh(config.parallel, CUDA)
        with fake_step(config, mesh, CUDA) as step:
            part, scale = step.engine.parts[0], torch.ones((), device=CUDA) if precision == "fp16" else None
            x_BTD = torch.zeros(1, 16, 32, device=CUDA, dtype=part.embed_in.weight.dtype, requires_grad=True)
            context = part.context(16, None, None, None)
            step.optimizer.begin(scale)
            with forward, no_waits():
                y_BTD = part.layers["0"](x_BTD, context)
            arrives = torch.zeros_like(y_BTD)
            step.optimizer.microbatch(0, last=False)
            with backward, no_waits():
                y_BTD.backward(arrives)
            with no_waits():
                tokens_BT = torch.zeros(1, 16, dtype=torch.int64, device=CUDA)
                step.optimizer.microbatch(0, last=True)
                part(tokens_BT, targets_BT=tokens_BT).sum().backward()  # an update finds the gradients of all parameters
            with update, no_waits():
                step.optimizer.step(1e-4, 1.0, scale)
    attention = f"_scaled_dot_product_{'efficient' if precision == 'fp32' else 'flash'}_attention"
    converted = Counter() if precision == "fp32" else ROTARY_IN_FP32
    assert forward.found == FORWARD + converted + Counter([attention])
    assert backward.found == BACKWARD + converted + Counter([f"{attention}_backward"])
    copied = Counter() if precision == "fp32" else Counter(_foreach_copy_=3 + num_layers - 1)  # masters to parameters, unit by unit
    assert update.found == UPDATE + copied + (Counter(div=1, mul=1) if scale is not None else Counter())
