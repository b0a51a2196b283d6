"""The matrix products of a step, recorded as it runs and executed alone.

A product is recorded with the shapes and strides of its operands, and executed by the library that does it in the step:
by `torch.addmm` or `torch.baddbmm`, or as oneDNN's. An attention kernel is recorded as the products that it does: of
causal attention those on and below the diagonal, in `ATTENTION_BLOCKS` blocks of rows, and in the backward pass the
scores again, which the kernel does not keep.

Legend: B sequences, H query heads, h heads of keys, G = H/h, S tokens, d width of a head.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION_BLOCKS = 8
"""Blocks of rows of a causal attention: with 8 its products are 9/16 of the whole, with infinitely many a half."""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


@dataclass(frozen=True)
class Product:
    """left @ right, or out += left @ right: matrices, or batches of them."""

    left: Layout
    right: Layout
    adds: bool = False
    onednn: bool = False
    """Whether it is a linear layer of oneDNN's, whose `right` is its weight, turned."""

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each element of the three-dimensional problem."""
        *batch, rows, inner = self.left[0]
        return 2 * torch.Size(batch).numel() * rows * inner * self.right[0][-1]

    @property
    def is_attention(self) -> bool:
        return len(self.left[0]) == 3

    def has_side(self, size: int) -> bool:
        """Whether one of its three sizes is this one."""
        return size in (*self.left[0], self.right[0][-1])


class RecordedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the products of the code inside. Compiled functions must run eagerly there.

    Raises, from the code inside:
        NotImplementedError: an operator that multiplies matrices and is none of those known here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if (record := RECORDED.get(name)) is not None:
            self.products += [product for product in record(*args, **(kwargs or {})) if product.left[0][-1] > 1]
        elif any(part in name for part in ("matmul", "linear", "convolution", "mm", "attention")):
            raise NotImplementedError(f"the products of {func.name()} are not known")
        return func(*args, **(kwargs or {}))


def _layout(tensor: Tensor) -> Layout:
    return tuple(tensor.shape), tuple(tensor.stride())


def _contiguous(*shape: int) -> Layout:
    return _layout(torch.empty(shape, device="meta"))


def _mm(left: Tensor, right: Tensor, *_: Any, **__: Any) -> Iterator[Product]:
    yield Product(_layout(left), _layout(right))


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Iterator[Product]:
    yield Product(_contiguous(x.numel() // x.shape[-1], x.shape[-1]), _layout(weight.T), onednn=True)


def _addmm(into: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, **_: Any) -> Iterator[Product]:
    yield Product(_layout(left), _layout(right), adds=beta != 0 and into.ndim == left.ndim)


def _causal(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(batches, rows, keys, width) of each block of rows; a group's query heads are rows of one matrix."""
    B, H, S, d = query.shape
    h, blocks = key.shape[1], ATTENTION_BLOCKS if query.shape[2] % ATTENTION_BLOCKS == 0 else 1
    for block in range(1, blocks + 1):
        yield B * h, H // h * (S // blocks), block * (S // blocks), d


def _attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any) -> Iterator[Product]:
    _require_causal(options, more)
    for n, rows, keys, d in _causal(query, key):
        yield Product(_contiguous(n, rows, d), _transposed(n, d, keys))  # scores
        yield Product(_contiguous(n, rows, keys), _contiguous(n, keys, d))  # output


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any
) -> Iterator[Product]:
    for n, rows, keys, d in _causal(query, key):
        yield Product(_contiguous(n, rows, d), _transposed(n, d, keys))  # scores again
        yield Product(_contiguous(n, rows, d), _transposed(n, d, keys))  # gradient of the probabilities
        yield Product(_transposed(n, keys, rows), _contiguous(n, rows, d), adds=True)  # of the values
        yield Product(_contiguous(n, rows, keys), _contiguous(n, keys, d))  # of the queries
        yield Product(_transposed(n, keys, rows), _contiguous(n, rows, d), adds=True)  # of the keys


def _transposed(n: int, rows: int, columns: int) -> Layout:
    return _layout(torch.empty(n, columns, rows, device="meta").transpose(1, 2))


def _require_causal(options: tuple[Any, ...], more: dict[str, Any]) -> None:
    if not (more.get("is_causal") or True in options):
        raise NotImplementedError("attention that is not causal")


RECORDED: dict[str, Callable[..., Iterable[Product]]] = {
    "mm": _mm,
    "bmm": _mm,
    "_scaled_mm": _mm,
    "addmm": _addmm,
    "addmm_": _addmm,
    "baddbmm": _addmm,
    "baddbmm_": _addmm,
    "onednn_linear": _linear,  # the teacher's, on a CPU
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
}
"""Name of an operator -> its products."""


def record_products(run: Callable[[], object]) -> list[Product]:
    """The products of a call, compiled functions run eagerly."""
    mode = RecordedProducts()
    with torch.compiler.set_stance("force_eager"), mode:
        run()
    return mode.products


class BareProducts:
    """The products one after the other, from and into memory that lies there; oneDNN allocates its own output.

    Operands of one layout share their memory, so that caches are as warm as can be. With `allocates` each product is a
    plain call that makes its output, as `left @ right` does.
    """

    def __init__(
        self, products: list[Product], *, dtype: torch.dtype, device: torch.device, allocates: bool = False
    ) -> None:
        self._allocates = allocates
        self._memory: dict[tuple[str, Layout], Tensor] = {}
        self._dtype, self._device = dtype, device
        self._runs = [self._prepared(product) for product in products]

    def __call__(self) -> None:
        for adds, out, left, right in self._runs:
            if out is None:
                torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
            elif self._allocates and not adds:
                torch.matmul(left, right)
            elif out.ndim == 2:
                torch.addmm(out, left, right, beta=adds, out=out)
            else:
                torch.baddbmm(out, left, right, beta=adds, out=out)

    def _prepared(self, product: Product) -> tuple[int, Tensor | None, Tensor, Tensor]:
        left, right = self._operand("in", product.left), self._operand("in", product.right)
        if product.onednn:
            return 0, None, left, right.T
        shape = (*product.left[0][:-1], product.right[0][-1])
        return int(product.adds), self._operand("out", _contiguous(*shape)), left, right

    def _operand(self, role: str, layout: Layout) -> Tensor:
        if (role, layout) not in self._memory:
            shape, strides = layout
            size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
            values = torch.randn(size, dtype=self._dtype, device=self._device).mul_(0.01)
            self._memory[role, layout] = values.as_strided(shape, strides)
        return self._memory[role, layout]


def by_part(products: Iterable[Product], *, vocab_rows: int, teacher_width: int) -> dict[str, int]:
    """FLOPs of the heads, of attention, of the teacher's layers and of the student's."""
    flops: Counter[str] = Counter()
    for product in products:
        if product.is_attention:
            flops["attention"] += product.flops
        elif product.has_side(vocab_rows):
            flops["heads"] += product.flops
        else:
            flops["teacher" if product.has_side(teacher_width) else "student"] += product.flops
    return dict(flops)
