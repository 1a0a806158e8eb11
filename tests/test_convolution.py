"""Compiled convolutions give what torch's do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from deepdem import convolution
from deepdem.convolution import LANES, NarrowConv, WinogradConv


def _draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _conv(inputs, outputs, *, bias=True, kind=torch.nn.Conv2d, **keywords):
    conv = kind(inputs, outputs, bias=bias, padding=1, **{"kernel_size": 3, **keywords})
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(7))
    return conv.double()


def _single(conv):
    return type(conv).float(conv)


@torch.inference_mode()
@given(
    n=st.integers(1, 3), height=st.integers(1, 21), width=st.integers(1, 70),
    inputs=st.integers(1, 3), outputs=st.integers(1, 4), bias=st.booleans(),
    add=st.booleans(), relu=st.booleans(), last=st.booleans(), up=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_winograd_is_the_convolution(
    n, height, width, inputs, outputs, bias, add, relu, last, up
):  # fmt: skip
    kind = {"kind": torch.nn.ConvTranspose2d, "kernel_size": 4, "stride": 2} if up else {}
    conv = _conv(LANES * inputs, LANES * outputs, bias=bias, **kind)
    x = _draw(1, n, LANES * inputs, height, width)
    exact = conv(x.double())
    beside = _draw(2, *exact.shape)
    if last:
        x, beside = (t.to(memory_format=torch.channels_last) for t in (x, beside))
    before = beside.clone()
    spread = float(exact.std())
    exact = exact + beside if add else exact
    exact = exact.relu() if relu else exact
    fast = WinogradConv(_single(conv))
    fast.relu = relu
    found = fast(x, beside if add else None)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found - exact).abs().max()) < 4e-5 * max(spread, 1)
    assert torch.equal(beside, before)


@torch.inference_mode()
def test_winograd_rounds_little():
    conv = _conv(128, 128)
    x = _draw(2, 2, 128, 16, 16)
    exact = conv(x.double())
    rms = (WinogradConv(_single(conv))(x) - exact).square().mean().sqrt() / exact.std()
    assert rms < 2e-6  # direct convolution: 0.2e-6


@torch.inference_mode()
@given(
    n=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 40),
    inputs=st.integers(1, 3), outputs=st.integers(1, 3), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_convolution_to_few_channels(n, height, width, inputs, outputs, bias):
    conv = _conv(LANES * inputs, outputs, bias=bias)
    x = _draw(3, n, LANES * inputs, height, width)
    found = NarrowConv(_single(conv))(x)
    exact = functional.conv2d(
        x.double(), conv.weight.double(), conv.bias.double() if bias else None, padding=1
    )
    torch.testing.assert_close(found, exact.float(), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [WinogradConv, NarrowConv])
def test_what_is_no_number_stays_none_and_stays_near(kind):
    conv = _single(_conv(16, 16 if kind is WinogradConv else 1))
    x = _draw(4, 1, 16, 24, 24)
    x[0, 3, 13, 13] = torch.nan
    fast = kind(conv)
    fast.relu = kind is WinogradConv
    missing = fast(x)[0].isnan().any(dim=0)
    assert missing[12:15, 12:15].all()
    tile = slice(8, 20)  # of a tile of 4x4, and those that see it
    missing[tile, tile] = False
    assert not missing.any()


def test_without_a_folder_for_what_is_compiled_it_is_compiled_each_time(monkeypatch):
    def njit(cache=False, **how):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, how)

    monkeypatch.setattr(convolution, "njit", njit)
    assert convolution._compiled(abs) == (abs, {"nogil": True, "error_model": "numpy"})
