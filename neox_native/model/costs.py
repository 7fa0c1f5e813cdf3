"""Costs: what a layer kind computes for a token, and what it keeps. Mathematics alone; the model knows no rank.

[Note: costs] A kind states its costs beside its cards. FLOPs, the balance of pipeline stages, and the planner's memory and
time read them; nobody else knows what is inside a kind. Numbers are of the whole kind and of one token's forward pass,
unless they say otherwise; where tensor parallelism cuts, each of t holders has 1 / t of them. What surrounds the kinds in a
residual step (the normalisation, the learned half of each kind's norm, the sum) is not theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Product:
    """A matrix product, [tokens, inner] x [inner, columns]."""

    inner: int
    columns: int
    cut: Literal["inner", "columns"]
    """The side that tensor parallelism cuts: the columns of what reads x̂, the inner side of what ends in a sum."""

    def held(self, holders: int) -> tuple[int, int]:
        """Inner and columns as one of so many holders multiplies them."""
        if self.cut == "inner":
            return self.inner // holders, self.columns
        return self.inner, self.columns // holders


@dataclass(frozen=True)
class Kept:
    """A tensor that a forward pass keeps for its backward pass."""

    name: str
    elements: int
    cut: bool = True
    """Whether tensor parallelism cuts it."""
    fp32: bool = False
    """Whether it is fp32 in every precision."""
    only_with_documents: bool = False
    """Whether it exists only with `data.document_attention`."""
    dear: bool = False
    """Whether selective recomputation keeps it, too: the result of a matrix product or of attention."""


@dataclass(frozen=True)
class Costs:
    """What one kind costs. See [Note: costs]."""

    products: tuple[Product, ...]
    """Its projections; the output projection comes last."""
    kept: tuple[Kept, ...]
    """The tensors that it keeps; what the norm before it makes is not among them."""
    flops: int = 0
    """Operations that run beside the projections."""
    model_flops: int = 0
    """The same operations as MFU counts them, forward and backward."""
    touched: int = 0
    """Elements that elementwise kernels read and write, where they are fused; tensor parallelism cuts them."""
    touched_eager: int = 0
    """The same, where every kernel runs by itself."""
    returning: int = 0
    """Elements in work at the end of a split backward pass's input half, beside the gradients that the weight half needs;
    tensor parallelism cuts them."""

    @property
    def multiply_adds(self) -> int:
        """What the projections multiply and add."""
        return sum(product.inner * product.columns for product in self.products)

    @property
    def opened(self) -> int:
        """Elements of what the projections of x̂ give; tensor parallelism cuts them."""
        return sum(product.columns for product in self.products if product.cut == "columns")
