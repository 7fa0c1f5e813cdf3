"""Activation checkpointing: forget what a block made in its forward pass, and make it again in the backward pass (Chen et al.
2016). "full" keeps the block's input; "selective" keeps also what is dear to make again (Korthikanti et al. 2022 §5).

[Note: recomputing once] A zero-bubble schedule takes the backward pass of a block apart: one call of autograd for the
gradient of its input, and one for each group of its parameters. torch's `checkpoint` recomputes in each of these calls,
seven times in all for a block of ours, and its `GraphExecGroup` refuses calls that need the same activation. So
`recompute_once` hands autograd empty holders; the first that is opened recomputes the block and fills them all, and each
frees its activation when autograd is done with it: from the input half to the weight half a block keeps what it would
keep without recomputation, and before that its input alone.

[Note: selective] The forward pass keeps the results of matrix products, attention and sums over the tp axis; the second pass
takes them, in the same order, where it would compute them, and repeats only what reads and writes memory. Nothing is kept
that the second pass, which ends when the last activation is there, does not come to: a block's last product and its sum.

[Note: compiled recomputation] A compiled block has one graph for both passes and needs none of this: `within_budget` lets torch
choose what it keeps, where "full" is a budget of nothing but inputs. Its backward graph makes again what it reads, once; a
recomputation around the graph would run all of it, last products and their sums over tp included. But torch may draw
other random numbers there: so blocks that drop recompute around their graph, "full" alone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the operations that are kept
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from neox_native.model.block import Block
from neox_native.model.positions import Context

aten, sums = torch.ops.aten, torch.ops._c10d_functional
DEAR = frozenset(
    packet.default
    for packet in (
        aten.mm,
        aten.addmm,
        aten.bmm,
        aten.baddbmm,
        aten._grouped_mm,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        sums.all_reduce,
        sums.reduce_scatter_tensor,
    )
)
"""Operations whose results selective recomputation keeps. See [Note: selective]."""


def recompute(block: Block, selective: bool = False) -> None:
    """Make a block forget its activations, all of them or those that are cheap to make again. In full it costs one more
    forward pass, in all 4/3 of the FLOPs.

    `forward` is replaced, not wrapped in a module, so that parameter names and hooks stay where they are. Dropout draws the
    same masks again by the context's seed, see [Note: masks]; no random state is kept.
    """
    forward = block.forward
    block.forward = lambda x, context: recompute_once(forward, x, context, selective)


@cache  # blocks with one backend share their compiled code
def within_budget(budget: float, compiler: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A backend for `torch.compile` whose code keeps for its backward pass at most a share of what it would keep, inputs left
    out of account; torch chooses what is cheapest to make again.

    Args:
        compiler: the backend that it stands for; Inductor, if None.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    settings: dict[str, Any] = {"activation_memory_budget": budget}
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):  # torch 2.13; device meshes, which hold no activations
        settings["unsafe_treat_script_objects_as_zero_size"] = True

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with config.patch(**settings):
            return (compiler or compile_fx)(graph, inputs)

    return backend


class _Dear(TorchDispatchMode):
    """Keeps the results of dear operations in a first pass, and gives them back in a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.again = False
        self.results: deque[tuple[Any, Any]] = deque()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """FlexAttention stays compiled under this mode, which does not see it: it is made again."""
        return True

    def end(self, count: int) -> None:
        """The first pass is over, and only so many results will be asked for."""
        while len(self.results) > count:
            self.results.pop()
        self.again = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in DEAR or _drops(function, args, kwargs):
            return function(*args, **kwargs)
        if self.again and self.results:
            made_by, result = self.results.popleft()
            assert made_by is function, f"the block was recomputed by other operations: {function} instead of {made_by}"
            return result
        result = function(*args, **kwargs)
        if not self.again:
            # Detached: autograd will tie the result itself to the graph, which would never be freed.
            self.results.append((function, tree_map_only(Tensor, Tensor.detach, result)))
        return result


def _drops(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is attention that drops. It must run again: the masks after it come from the stream that it leaves."""
    for argument, value in zip(function._schema.arguments, args):
        if argument.name == "dropout_p":
            return value > 0
    return kwargs.get("dropout_p", 0) > 0


class _Holder:
    """Stands for an activation in the graph."""

    activation: Tensor | None = None


class _Filled(Exception):
    """All holders are filled: what is left of the forward pass is not needed."""


def recompute_once(
    forward: Callable[[Tensor, Context], Tensor], x_BTD: Tensor, context: Context, selective: bool = False
) -> Tensor:
    """`forward(x_BTD, context)`, which is run again once when autograd first asks for an activation.

    Args:
        selective: keep the results of dear operations, too.
    """
    if not torch.is_grad_enabled():
        return forward(x_BTD, context)
    holders: list[weakref.ref[_Holder]] = []
    input_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)
    mode = _Dear() if selective else None
    count = 0

    def pack(_activation: Tensor) -> _Holder:
        nonlocal count
        holder = _Holder()
        holders.append(weakref.ref(holder))
        count = len(mode.results) if mode is not None else 0
        return holder

    def again() -> None:
        filled = 0

        def fill(activation: Tensor) -> Tensor:
            nonlocal filled
            if (holder := holders[filled]()) is not None:
                holder.activation = activation.detach()
            filled += 1
            if filled == len(holders):
                raise _Filled
            return activation.detach()  # an output that its own graph kept would never be freed

        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, lambda activation: activation), mode or nullcontext():
                forward(input_BTD, context)
        except _Filled:
            pass

    def unpack(holder: _Holder) -> Tensor:
        if holder.activation is None:
            again()
        assert holder.activation is not None, "the block saved other activations when it was recomputed"
        return holder.activation

    with saved_tensors_hooks(pack, unpack), mode or nullcontext():
        output_BTD = forward(x_BTD, context)
    if mode is not None:
        mode.end(count)
    return output_BTD
