"""Which tensors share memory: an op that writes in place must not be given one byte twice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Address of the first byte, bytes an element, shape, strides in elements.
_Block = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def check_disjoint(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises ValueError if two written tensors, or a written and a read one, share memory.

    Also if a written tensor shares memory with itself (an expanded one). Tensors interleaved in one
    allocation are told apart where their strides nest, as those of views do.
    """
    names = [*written, *read]
    blocks = [
        (x.data_ptr(), x.element_size(), tuple(x.shape), tuple(x.stride()))
        for x in (*written.values(), *read.values())
    ]
    clash = _first_overlap(blocks, len(written))
    if clash is None:
        return
    first, second = (names[i] for i in clash)
    if first == second:
        _, _, shape, strides = blocks[clash[0]]
        raise ValueError(
            f"{first}: expected every element in memory of its own, "
            f"got strides {list(strides)} for shape {list(shape)}"
        )
    raise ValueError(f"{second}: expected memory apart from that of {first}, got an overlap")


class _Extent:
    """`width` contiguous bytes, repeated along `dims` of (stride in bytes, size), widest first."""

    def __init__(self, item: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        pairs = zip(strides, shape, strict=True)
        dims = sorted((stride * item, size) for stride, size in pairs if size > 1)
        self.width = item
        while dims and dims[0][0] == self.width:
            self.width *= dims.pop(0)[1]
        self.nested = True
        self.span = self.width
        for stride, size in dims:
            self.nested &= stride >= self.span
            self.span += stride * (size - 1)
        self.dims = dims[::-1]


def _first_overlap(blocks: Sequence[_Block], written: int) -> tuple[int, int] | None:
    made: dict[tuple, _Extent] = {}  # most layers of a model are alike, and have one extent
    extents = []
    for block in blocks:
        layout = block[1:]
        extent = made.get(layout)
        if extent is None:
            extent = made[layout] = _Extent(*layout)
        extents.append(extent)
    open_blocks: list[tuple[int, int, _Extent]] = []  # number, start, extent
    end = 0  # of all of these
    for start, i in sorted((block[0], i) for i, block in enumerate(blocks) if 0 not in block[2]):
        extent = extents[i]
        if i < written and not extent.nested:
            return i, i
        open_blocks = [x for x in open_blocks if x[1] + x[2].span > start] if start < end else []
        for j, other_start, other in open_blocks:
            if (i < written or j < written) and _share_bytes(other, extent, start - other_start):
                return min(i, j), max(i, j)
        open_blocks.append((i, start, extent))
        end = max(end, start + extent.span)
    return None


def _share_bytes(a: _Extent, b: _Extent, distance: int) -> bool:
    if not (a.nested and b.nested):
        return True
    return _meet(a.dims, a.width, a.span, b.dims, b.width, b.span, distance)


def _meet(
    a: Sequence[tuple[int, int]],
    a_width: int,
    a_span: int,
    b: Sequence[tuple[int, int]],
    b_width: int,
    b_span: int,
    distance: int,
) -> bool:
    """Whether `a` at 0 and `b` at `distance` share a byte; True where that is not known."""
    if distance >= a_span or -distance >= b_span:
        return False
    a_stride, b_stride = (x[0][0] if x else 0 for x in (a, b))
    if a_stride == b_stride == 0:
        return True
    if a_stride == b_stride:
        stride, a_size, b_size = a_stride, a[0][1], b[0][1]
        a_inner, b_inner = a_span - stride * (a_size - 1), b_span - stride * (b_size - 1)
        # Copy i of a meets copy k of b only where the inner parts, `step * stride` nearer, do.
        first = -((distance + b_inner - 1) // stride)
        last = (a_inner - 1 - distance) // stride
        return any(
            -a_size < step < b_size
            and _meet(a[1:], a_width, a_inner, b[1:], b_width, b_inner, distance + step * stride)
            for step in range(first, last + 1)
        )
    # Only one of them repeats at this stride: its copies one by one, if there are few.
    wide, size = a[0] if a_stride > b_stride else b[0]
    if size > 64:
        return True
    inner = (a_span if a_stride > b_stride else b_span) - wide * (size - 1)
    if a_stride > b_stride:
        return any(
            _meet(a[1:], a_width, inner, b, b_width, b_span, distance - i * wide)
            for i in range(size)
        )
    return any(
        _meet(a, a_width, a_span, b[1:], b_width, inner, distance + i * wide) for i in range(size)
    )
