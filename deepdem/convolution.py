"""Convolutions of 3x3 pixels on the CPU that are faster than torch's, compiled.

Most are done with fewer multiplications, by Winograd's minimal filtering F(4, 3) as Lavin & Gray
(2016, section 4) lay it out: of each 4x4 output pixels, 6x6 input pixels are transformed,
multiplied by the transformed kernel (36 products of matrices of tiles by channels) and transformed
back. That is 36 multiplications for 144, and 36 weights in memory for 9. numba compiles it when it
is first needed, for the processor it runs on, and keeps that on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["LANES", "NarrowConv", "WinogradConv"]

#: Channels that are transformed at once. Inputs and outputs must have a multiple of them.
LANES = 16
# What is multiplied at once, by a processor with many or with few vector registers: rows of the one
# matrix, and vectors of the other's columns.
_ROWS, _VECTORS = (8, 2) if get_host_cpu_features().get("avx512f") else (4, 1)
Numbers: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, int, int, int]
# Tiles that are on their way at once: what is between two steps, in numbers, stays in a core's
# cache; but there are so many that loading the weights is worth it.
_CACHE, _FEWEST = 2**18, 64


def _toom_cook(points: tuple[float, ...], kernel: int) -> tuple[NDArray[np.float64], ...]:
    """Return what input, kernel and products are multiplied by: B^T, G and A^T.

    Of Winograd's minimal filtering F(m, r), Y = A^T [(G g G^T) * (B^T d B)] A, from m + r - 2
    points and infinity (Lavin & Gray, 2016, equation 9; Barabasz et al., 2020, section 2).
    """
    count = len(points) + 1

    def powers(columns: int) -> NDArray[np.float64]:
        finite = [[point**k for k in range(columns)] for point in points]
        return np.array([*finite, [0.0] * (columns - 1) + [1.0]])

    inputs = np.linalg.inv(powers(count)).T
    largest = np.abs(inputs).max(axis=1, keepdims=True)
    return inputs / largest, powers(kernel) * largest, powers(count - kernel + 1).T


# F(4, 3). Of all points 0, a, -a, b, -b these round least: 0.6e-6 of the result's standard
# deviation, where 1 and 2, which are more usual, give 1.4e-6 and direct convolution 0.1e-6.
_INPUTS, _KERNEL, _OUTPUTS = _toom_cook((0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)), 3)


class WinogradConv(nn.Module):
    """A 3x3 convolution, or that of a map upsampled to twice its size, by Winograd's filtering.

    Parameters
    ----------
    conv
        3x3, stride 1, padded by one pixel of zeros; or transposed, 4x4, stride 2, padding 1. Its
        input and output channels are multiples of `LANES`.

    Attributes
    ----------
    relu
        Whether what is negative becomes zero, after all is added.
    """

    bias: Tensor

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.relu, self.up, weight = False, 1, conv.weight.detach().double()
        if isinstance(conv, nn.ConvTranspose2d):
            # Four convolutions of the small map, one for each of an output's two by two pixels. Of
            # a transposed kernel k, even rows have k[3] for the row before and k[1] for the same
            # one, odd rows k[2] for the same one and k[0] for the next.
            self.up = 2
            taps = weight.new_zeros(2, 3, 4)
            taps[0, 0, 3] = taps[0, 1, 1] = taps[1, 1, 2] = taps[1, 2, 0] = 1
            weight = torch.einsum("pia,qjb,coab->pqocij", taps, taps, weight).flatten(0, 2)
            weight = weight.contiguous()
        outputs, channels = weight.shape[:2]
        width = 2 * LANES if _VECTORS == 2 and outputs % (2 * LANES) == 0 else LANES
        # (3 * 3, panel, in, column): columns that are multiplied at once lie beside each other.
        panels = weight.view(-1, width, channels, 9).permute(3, 0, 2, 1).reshape(9, -1)
        there = torch.from_numpy(np.kron(_KERNEL, _KERNEL)) @ panels
        self.weight = nn.Parameter(there.float().view(-1, channels, width))
        self.register_buffer("bias", _bias(conv))

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the result with `add` added, channels last in memory, float32.

        Parameters
        ----------
        x
            (n, in, y, x), float32; fastest if channels are last in memory.
        add
            Of the result's shape, (n, out, y, x), or (n, out, 2 y, 2 x) if upsampled.
        """
        n, channels, height, width = x.shape
        outputs = len(self.bias) * self.up**2
        made = x.new_empty(n, self.up * height, self.up * width, len(self.bias))
        # What is compiled looks at nothing of this.
        assert self.weight.numel() == 36 * channels * outputs
        assert add is None or add.permute(0, 2, 3, 1).shape == made.shape
        tiles = n * -(-height // 4) * -(-width // 4)
        fit = _CACHE // (36 * (channels + outputs)) // _ROWS
        most = _ROWS * min(-(-tiles // _ROWS), max(fit, _FEWEST // _ROWS))
        _convolve(
            _flat(x), (n, height, width, channels), most, self.weight.view(-1).numpy(), outputs,
            self.bias.numpy(), np.float32(0 if self.relu else -np.inf),
            made.view(-1).numpy() if add is None else _flat(add), add is not None, self.up,
            made.view(-1).numpy(),
        )  # fmt: skip
        return made.permute(0, 3, 1, 2)


class NarrowConv(nn.Module):
    """A 3x3 convolution to few channels: a product of vectors for each pixel.

    Parameters
    ----------
    conv
        3x3, stride 1, padded by one pixel of zeros. Its input channels are a multiple of `LANES`.
    """

    bias: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous())
        self.register_buffer("bias", _bias(conv))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, out, y, x), channels last in memory, of (n, in, y, x), both float32."""
        n, channels, height, width = x.shape
        outputs = len(self.bias)
        made = x.new_empty(n, height, width, outputs)
        assert self.weight.numel() == 9 * channels * outputs
        _convolve_narrow(
            _flat(x), (n, height, width, channels), self.weight.view(-1).numpy(), outputs,
            self.bias.numpy(), made.view(-1).numpy(),
        )  # fmt: skip
        return made.permute(0, 3, 1, 2)


def _bias(conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()


def _flat(x: Tensor) -> Numbers:
    """Return the numbers of (n, channel, y, x), channels last."""
    assert x.dtype == torch.float32
    numbers: Numbers = x.permute(0, 2, 3, 1).contiguous().view(-1).numpy()
    return numbers


# --- compiled ------------------------------------------------------------------------------------
#
# Between the steps numbers lie in blocks (point, tiles / _ROWS, channels / LANES, _ROWS, LANES): a
# vector is one tile's, and all that a product needs at once is a constant distance apart. Loops
# over such vectors are written in LLVM's language. In numba's the compiler cannot know that source
# and target do not overlap (twice the time), and a product of matrices outside of it wants
# Python's lock three times for each few tiles, for which threads wait.


def _vectors(
    builder: Any, signature: Any, args: Any, context: Any
) -> tuple[Any, Callable[..., Any]]:
    """Return the type of `LANES` numbers, and a function that finds them in a flat array."""
    vector = ir.VectorType(ir.FloatType(), LANES)

    def place(array: int, *offsets: Any) -> Any:
        pointer = make_array(signature.args[array])(context, builder, args[array]).data
        for offset in offsets:
            pointer = builder.gep(pointer, [offset])
        return builder.bitcast(pointer, vector.as_pointer())

    return vector, place


def _times(builder: Any, step: Any, count: int) -> Any:
    return builder.mul(step, ir.Constant(step.type, count))


def _splat(builder: Any, vector: Any, number: Any) -> Any:
    """Return a vector that is one number all over."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(first, nothing, everywhere)


def _plus(builder: Any, total: Any, one: Any, other: Any) -> Any:
    product = builder.fmul(one, other, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def _combination(matrix: NDArray[np.float64]) -> Any:
    """Return a compiled product of a constant matrix and vectors.

    ``(source, at, step, target, to, by)``: the target's vector at ``to + k * by`` becomes row k of
    the matrix times the source's at ``at + j * step``.
    """
    rows: list[list[float]] = matrix.astype(np.float32).tolist()

    def combine(
        context: Any, source: Any, at: Any, step: Any, target: Any, to: Any, by: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, place = _vectors(builder, signature, args, context)
            _, at, step, _, to, by = args
            sums = _sums(builder, vector, rows, lambda j: place(0, at, _times(builder, step, j)))
            for k, total in enumerate(sums):
                builder.store(total, place(3, to, _times(builder, by, k)), align=4)
            return context.get_dummy_value()

        return types.void(source, at, step, target, to, by), generate

    return intrinsic(combine)


def _sums(
    builder: Any, vector: Any, rows: list[list[float]], place: Callable[[int], Any]
) -> list[Any]:
    used = [j for j in range(len(rows[0])) if any(row[j] for row in rows)]
    loaded = {j: builder.load(place(j), align=4) for j in used}
    sums = []
    for row in rows:
        total = None
        for j in used:
            if row[j]:
                factor = ir.Constant(vector, [row[j]] * LANES)
                total = _plus(builder, total, loaded[j], factor)
        sums.append(total)
    return sums


def _finish(matrix: NDArray[np.float64], *, add: bool) -> Any:
    """Return what ends a convolution.

    ``(source, at, step, target, to, by, beside, bias, channel, low)``: as `_combination`; then a
    vector of the bias is added, and if `add` says so what `beside` has at the target's places;
    what is less than `low` becomes it.
    """
    rows: list[list[float]] = matrix.astype(np.float32).tolist()

    def finish(
        context: Any, source: Any, at: Any, step: Any, target: Any, to: Any, by: Any,
        beside: Any, bias: Any, channel: Any, low: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, place = _vectors(builder, signature, args, context)
            _, at, step, _, to, by, _, _, channel, low = args
            sums = _sums(builder, vector, rows, lambda j: place(0, at, _times(builder, step, j)))
            constant = builder.load(place(7, channel), align=4)
            least = _splat(builder, vector, low)
            for k, one in enumerate(sums):
                total = builder.fadd(one, constant)
                if add:
                    other = place(6, to, _times(builder, by, k))
                    total = builder.fadd(total, builder.load(other, align=4))
                # So that NaN stays NaN.
                total = builder.select(builder.fcmp_ordered("<", total, least), least, total)
                builder.store(total, place(3, to, _times(builder, by, k)), align=4)
            return context.get_dummy_value()

        kinds = source, at, step, target, to, by, beside, bias, channel, low
        return types.void(*kinds), generate

    return intrinsic(finish)


def _product(vectors: int) -> Any:
    """Return a compiled product of two matrices.

    ``(one, at, chunks, other, to, product, into)``: `_ROWS` rows of the one, in `chunks` blocks of
    `LANES` columns, times the other's columns, `vectors` times `LANES` beside each other.
    """

    def multiply(
        context: Any, one: Any, at: Any, chunks: Any, other: Any, to: Any, product: Any, into: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, place = _vectors(builder, signature, args, context)
            _, at, chunks, _, to, _, into = args
            whole = at.type

            def fixed(count: int) -> Any:
                return ir.Constant(whole, count)

            cells = [(r, v) for r in range(_ROWS) for v in range(vectors)]
            sums = {cell: cgutils.alloca_once(builder, vector) for cell in cells}
            for place_of_sum in sums.values():
                builder.store(ir.Constant(vector, [0.0] * LANES), place_of_sum)
            with cgutils.for_range(builder, chunks) as chunk:
                block = builder.mul(chunk.index, fixed(_ROWS * LANES))
                panel = builder.mul(chunk.index, fixed(LANES * vectors * LANES))
                with cgutils.for_range(builder, fixed(LANES)) as column:
                    row = builder.mul(column.index, fixed(vectors * LANES))
                    beside = [
                        builder.load(place(3, to, panel, row, fixed(v * LANES)), align=4)
                        for v in range(vectors)
                    ]
                    for r in range(_ROWS):
                        lane = place(0, at, block, column.index, fixed(r * LANES))
                        number = builder.bitcast(lane, ir.FloatType().as_pointer())
                        factor = _splat(builder, vector, builder.load(number))
                        for v in range(vectors):
                            total = builder.load(sums[r, v])
                            builder.store(_plus(builder, total, factor, beside[v]), sums[r, v])
            for (r, v), place_of_sum in sums.items():
                target = place(5, into, fixed((v * _ROWS + r) * LANES))
                builder.store(builder.load(place_of_sum), target, align=4)
            return context.get_dummy_value()

        return types.void(one, at, chunks, other, to, product, into), generate

    return intrinsic(multiply)


def _run(
    context: Any, lines: Any, first: Any, second: Any, third: Any, kernel: Any, at: Any, count: Any
) -> Any:
    """``(lines, first, second, third, kernel, at, count)``: sum three runs by a kernel's rows.

    Each run has `count` vectors, which lie one after the other; so do the kernel's three rows.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, place = _vectors(builder, signature, args, context)
        _, *runs, _, at, count = args
        length = _times(builder, count, LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in runs]
        for place_of_sum in sums:
            builder.store(ir.Constant(vector, [0.0] * LANES), place_of_sum)
        with cgutils.for_range(builder, count) as loop:
            step = _times(builder, loop.index, LANES)
            for k, (run, place_of_sum) in enumerate(zip(runs, sums, strict=True)):
                pixels = builder.load(place(0, run, step), align=4)
                factors = builder.load(place(4, at, _times(builder, length, k), step), align=4)
                total = _plus(builder, builder.load(place_of_sum), pixels, factors)
                builder.store(total, place_of_sum)
        total = builder.load(sums[0])
        for place_of_sum in sums[1:]:
            total = builder.fadd(total, builder.load(place_of_sum))
        kind = ir.FunctionType(ir.FloatType(), (ir.FloatType(), vector))
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(
            reduce, (ir.Constant(ir.FloatType(), 0.0), total), fastmath=("reassoc",)
        )

    return types.float32(lines, first, second, third, kernel, at, count), generate


_of_inputs, _of_outputs = _combination(_INPUTS), _combination(_OUTPUTS)
_to_result, _to_sum = _finish(_OUTPUTS, add=False), _finish(_OUTPUTS, add=True)
_multiply_one, _multiply_two = _product(1), _product(2)
_dot = intrinsic(_run)


def _compiled(function: Callable[..., None]) -> Any:
    how: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:  # nowhere to keep it: neither beside this file nor in the user's folder
        return njit(**how)(function)


@_compiled
def _transform(
    source: Numbers, shape: Shape, first: int, count: int, most: int, target: Numbers,
) -> None:  # fmt: skip
    """Give tiles [first, first + count) of (n, y, x, channel) in blocks."""
    _, height, width, channels = shape
    down, across = (height + 3) // 4, (width + 3) // 4
    row, plane = width * channels, most * channels
    half = np.empty(36 * LANES, np.float32)
    edge = np.empty(36 * LANES, np.float32)
    for k in range(count):
        image, tile = divmod(first + k, down * across)
        y, x = tile // across * 4 - 1, tile % across * 4 - 1
        start = ((image * height + y) * width + x) * channels
        inside = y >= 0 and x >= 0 and y + 6 <= height and x + 6 <= width
        to = k // _ROWS * _ROWS * channels + k % _ROWS * LANES
        for c in range(0, channels, LANES):
            if inside:
                for j in range(6):
                    _of_inputs(source, start + j * channels + c, row, half, j * LANES, 6 * LANES)
            else:
                for i in range(6):
                    for j in range(6):
                        here = start + i * row + j * channels + c
                        known = 0 <= y + i < height and 0 <= x + j < width
                        for m in range(LANES):
                            edge[(6 * i + j) * LANES + m] = source[here + m] if known else 0
                for j in range(6):
                    _of_inputs(edge, j * LANES, 6 * LANES, half, j * LANES, 6 * LANES)
            for i in range(6):
                _of_inputs(half, 6 * i * LANES, LANES, target, 6 * i * plane + to, plane)
            to += _ROWS * LANES


@_compiled
def _multiply(
    one: Numbers, other: Numbers, tiles: int, most: int, channels: int, outputs: int,
    product: Numbers,
) -> None:  # fmt: skip
    """Multiply the blocks of tiles by the kernel, point by point."""
    pairs = _VECTORS == 2 and outputs % (2 * LANES) == 0
    wide = 2 * LANES if pairs else LANES
    for point in range(36):
        for k in range(0, outputs, wide):
            panel = (point * outputs + k) * channels
            for t in range(0, tiles, _ROWS):
                at = (point * most + t) * channels
                into = (point * most + t) * outputs + k * _ROWS
                if pairs:
                    _multiply_two(one, at, channels // LANES, other, panel, product, into)
                else:
                    _multiply_one(one, at, channels // LANES, other, panel, product, into)


@_compiled
def _restore(
    source: Numbers, shape: Shape, first: int, count: int, most: int, bias: Numbers, low: float,
    beside: Numbers, add: bool, up: int, target: Numbers,
) -> None:  # fmt: skip
    """Put blocks of tiles into (n, up * y, up * x, channel / up / up)."""
    _, height, width, channels = shape
    down, across = (height + 3) // 4, (width + 3) // 4
    outputs, plane = channels // (up * up), most * channels
    half = np.empty(24 * LANES, np.float32)
    edge = np.empty(4 * LANES, np.float32)
    by = up * outputs
    for k in range(count):
        image, tile = divmod(first + k, down * across)
        y, x = tile // across * 4, tile % across * 4
        rows, columns = min(4, height - y), min(4, width - x)
        at = k // _ROWS * _ROWS * channels + k % _ROWS * LANES
        for c in range(0, channels, LANES):
            phase, channel = divmod(c, outputs)
            for j in range(6):
                _of_outputs(source, j * plane + at, 6 * plane, half, j * LANES, 6 * LANES)
            at += _ROWS * LANES
            for i in range(rows):
                line = (image * height + y + i) * up + phase // up
                to = (line * width * up + x * up + phase % up) * outputs + channel
                into, other, begin, step = target, beside, to, by
                if columns < 4:
                    into, other, begin, step = edge, edge, 0, LANES
                    for j in range(columns):
                        for m in range(LANES):
                            edge[j * LANES + m] = beside[to + j * by + m]
                row = 6 * i * LANES
                if add:
                    _to_sum(half, row, LANES, into, begin, step, other, bias, channel, low)
                else:
                    _to_result(half, row, LANES, into, begin, step, other, bias, channel, low)
                if columns < 4:
                    for j in range(columns):
                        for m in range(LANES):
                            target[to + j * by + m] = edge[j * LANES + m]


@_compiled
def _convolve(
    source: Numbers, shape: Shape, most: int, kernel: Numbers, outputs: int, bias: Numbers,
    low: float, beside: Numbers, add: bool, up: int, target: Numbers,
) -> None:  # fmt: skip
    """Convolve `most` tiles at a time."""
    n, height, width, channels = shape
    tiles = n * ((height + 3) // 4) * ((width + 3) // 4)
    seen = np.zeros(36 * most * channels, np.float32)
    product = np.empty(36 * most * outputs, np.float32)
    for first in range(0, tiles, most):
        # The last blocks may have more rows than tiles: what is in them is left over.
        count = min(most, tiles - first)
        _transform(source, shape, first, count, most, seen)
        _multiply(seen, kernel, count, most, channels, outputs, product)
        _restore(
            product, (n, height, width, outputs), first, count, most,
            bias, low, beside, add, up, target,
        )  # fmt: skip


@_compiled
def _convolve_narrow(
    source: Numbers, shape: Shape, kernel: Numbers, outputs: int, bias: Numbers, target: Numbers,
) -> None:  # fmt: skip
    """Convolve row by row, from three rows with a pixel of zeros at either end."""
    n, height, width, channels = shape
    run = (width + 2) * channels
    lines = np.zeros(3 * run, np.float32)
    count = 3 * channels // LANES
    for image in range(n):
        for below in range(-1, height + 1):
            line = (below + 3) % 3 * run
            if 0 <= below < height:
                start = (image * height + below) * width * channels
                for m in range(width * channels):
                    lines[line + channels + m] = source[start + m]
            else:
                for m in range(width * channels):
                    lines[line + channels + m] = 0
            y = below - 1
            if y < 0:
                continue
            above, this = (y + 2) % 3 * run, y % 3 * run
            for x in range(width):
                to = ((image * height + y) * width + x) * outputs
                for k in range(outputs):
                    target[to + k] = bias[k] + _dot(
                        lines, above + x * channels, this + x * channels, line + x * channels,
                        kernel, k * 9 * channels, count,
                    )  # fmt: skip
