"""A GPU that does not exist: fake tensors on "cuda:0" on a torch that may know no CUDA, and an error for every wait.

[Note: two answers] A torch built for CPUs has no streams for autograd to ask about. So torch's C++ code, which asks a fake tensor for
its device through `torch.ops.prim.device`, is told "cpu", and all Python code, ours, torch's and the fake mode's own, "cuda:0". Formulas of
autograd in C++ then ask for gradients on the "cpu" where they go back through a conversion; `no_waits` lets those stay where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.nn.attention import flex_attention
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from neox_native.model.kinds import attention
from neox_native.parallel.recompute import _Dear

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Waits(AssertionError):
    """The host waited for the device."""


@contextmanager
def no_waits(but_for_copies: bool = False) -> Iterator[None]:
    """Let the body raise `Waits` at a copy between host and device that waits for what the device has queued, unless told otherwise. Fake
    tensors raise by themselves where their content, or a shape that depends on it, is asked for."""
    with _Copies(but_for_copies), mock.patch.multiple(Tensor, cpu=download(Tensor.cpu), to=download(Tensor.to)):
        yield


def download(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.cpu` or `Tensor.to`, which torch's C++ code takes for nothing to do. See [Note: two answers]."""

    def checked(tensor: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        targets = (*arguments, *settings.values())
        to_host = function.__name__ == "cpu" or any(str(getattr(each, "device", each)) == "cpu" for each in targets)
        if to_host and tensor.device.type == "cuda":
            raise Waits(f"{function} to the host waits for the device")
        if tensor.device in targets and all(each == tensor.device or isinstance(each, bool) for each in targets):
            return tensor  # nothing to do
        return function(tensor, *arguments, **settings)

    return checked


class _Copies(TorchDispatchMode):
    """Finds the other copies. See [Note: two answers]."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed

    supports_higher_order_operators = True

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, if it waits for nothing."""
        kwargs = dict(kwargs or {})
        if function is torch.ops.aten._fused_adamw_.tensor_lr:
            return None  # with a rate on the device torch cannot fake it
        if function in COPIES:
            if kwargs.get("device") == torch.device("cpu") and called_by_autograd():
                kwargs["device"] = args[0].device
            source, target = (args[0].device, kwargs.get("device") or args[0].device)
            if function is torch.ops.aten.copy_.default:
                target, source = (each.device for each in args[:2])
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if not self.allowed and {source.type, target.type} == {"cpu", "cuda"} and not (non_blocking and target.type == "cuda"):
                raise Waits(f"{function} from {source} to {target} waits for the device")
        return function(*args, **kwargs)


def called_by_autograd() -> bool:
    """Whether the operation is one of autograd's formulas in C++, and not of a function in Python that autograd runs."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if "/torch/" not in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return frame is not None


class Event:
    """Stands for `torch.cuda.Event`; what it would time is never over."""

    def __init__(self, **_settings: bool) -> None:
        pass

    def record(self, *_stream: Any) -> None:
        """On the current stream."""

    def query(self) -> bool:
        """Whether it is over."""
        return False

    def synchronize(self) -> None:
        """Waits."""
        raise Waits("an event was waited for")


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **settings: bool
) -> Tensor:
    """What `scaled_dot_product_attention` is on a GPU; torch's C++ code would choose a CPU's."""
    if settings.get("enable_gqa"):
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """FlexAttention without a compiler, which would want content; the operator is the one that a compiled one has."""
    with mock.patch.object(torch.compiler, "is_dynamo_compiling", lambda: True):
        return flex_attention.flex_attention(q, k, v, **settings)


def grouped(*arguments: Any) -> dict[tuple[torch.device, torch.dtype], Any]:
    """Lists of tensors by device and type, as optimizers and norms ask for them in C++."""
    return {(found[0][0][0].device, dtype): found for (_, dtype), found in _GROUPED(*arguments).items()}


_GROUPED = torch._C._group_tensors_by_device_and_dtype


def waits(*_arguments: Any, **_settings: Any) -> None:
    """Stands for what waits."""
    raise Waits("the device was synchronised")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """CUDA for the body, which makes its fake tensors on `CUDA` and runs what must not wait inside `no_waits`."""
    handlers = fake_tensor._DISPATCH_META_HANDLERS
    asked = torch.ops.prim.device.default
    answer = handlers[asked]

    def for_cpp(arguments: Any) -> torch.device:
        found = answer(arguments)
        return torch.device("cpu") if found.type == "cuda" else found

    state = torch.zeros(16, dtype=torch.uint8)
    replaced = {
        "Event": Event,
        "default_generators": (torch.Generator(),),
        "synchronize": waits,
        "get_rng_state": lambda *_: state,
        "set_rng_state": lambda *_: None,
    }
    with (
        mock.patch.dict(handlers, {asked: for_cpp}),
        mock.patch.multiple(torch.cuda, **replaced),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, fake_tensor.FakeTensor]),
        mock.patch.object(F, "scaled_dot_product_attention", attend),
        mock.patch.object(attention, "_compiled_flex_attention", lambda: attend_in_blocks),
        mock.patch.object(_Dear, "supports_higher_order_operators", True, create=True),  # a compiled one it does not see
    ):
        yield
