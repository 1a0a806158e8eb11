"""Networks made fast for inference: the same residuals from fewer and cheaper operations.

What is rewritten is exact but for rounding, and each rewriting is checked on a probe: a network
that it does not suit keeps its own way.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from deepdem.models import ModelSpec, ResidualNet

__all__ = ["UpsampledConv", "WinogradConv", "exact_float32", "for_inference"]

# Fewer channels, and the transforms cost more than the multiplications that they save.
_WINOGRAD_CHANNELS = 128
# A network that takes any multiple of 32 pixels is tried on these: a map of 4 at its deepest.
_PROBE_PX = 128
# Tiles in one matrix product: enough that the weights are worth loading, and no more, so that what
# is between two steps stays in a core's cache.
_TILES = 64


def for_inference(net: ResidualNet, *, bf16: bool = False, compiled: bool = False) -> ResidualNet:
    """Return a copy of the network that gives the same residuals faster and cannot be trained.

    Batch normalisation is folded into the convolution before it, which saves a pass over the
    activations; a U-Net's nearest upsampling into the convolution after it (`UpsampledConv`); on
    the CPU, float32 convolutions of many channels are done with fewer multiplications
    (`WinogradConv`). The layout is the one in which convolutions are fastest.

    Parameters
    ----------
    net
        In evaluation mode, on the device where it will run; it is not changed.
    bf16
        Whether convolutions run in bfloat16. Where nothing but convolutions and linear layers
        holds weights once all is folded, so are the weights: autocast would convert them for
        each batch anew. Elsewhere it is autocast, which keeps normalisations in float32.
    compiled
        Whether the network goes through `torch.compile` when it is first called. It does not see
        through `WinogradConv`, which is left out: of a ResNet-18 U-Net, what is compiled takes
        0.94 of the time of what is not.
    """
    device = next(net.parameters()).device
    rewrites = [_fold]
    if device.type == "cpu" and not bf16:
        rewrites += [_merge_upsampling, *([] if compiled else [_winograd])]
    network = _rewritten(net.network, rewrites, _probe(net.spec).to(device))
    fast = ResidualNet(net.spec, network.to(memory_format=torch.channels_last))
    linear = (nn.modules.conv._ConvNd, nn.Linear)
    if bf16 and all(isinstance(m, linear) for m in network.modules() if _holds_weights(m)):
        fast.network.bfloat16()
        fast.weights_dtype = torch.bfloat16
    fast.bf16 = bf16
    fast.eval().requires_grad_(False)
    if compiled:
        fast.network.compile()
    return fast


def _probe(spec: ModelSpec) -> Tensor:
    """Return a batch of one that the network takes, no larger than it must be."""
    size = min(spec.chip_size, _PROBE_PX) if spec.window_step else spec.chip_size
    draw = torch.Generator().manual_seed(0)
    return torch.randn((1, len(spec.layers), size, size), generator=draw)


# --- what float32 is -----------------------------------------------------------------------------

_lock = threading.Lock()
_within = 0
_found: tuple[Any, ...] = ()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let float32 be float32 in this process as long as any thread is within.

    As it comes, torch lets convolutions on a card round their inputs to ten bits (TF32), and a
    user may have allowed the like to matrix products, to bfloat16 on a CPU even: Lightning
    advises ``torch.set_float32_matmul_precision("medium")``. Both are off by 1e-3, centimetres
    of a residual of tens of metres. They are settings of the process, not of a thread: whoever
    comes first changes them, and the last to leave puts back what was found.
    """
    global _within, _found
    with _lock:
        if not _within:
            _found = _precisions()
            _set_precisions((False, "highest", *("ieee" for _ in _places())))
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                _set_precisions(_found)


def _places() -> tuple[Any, ...]:
    """Return where torch 2.9 and newer keep what float32 is."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return ()
    of_cuda = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    return (*of_cuda, backends.mkldnn.conv, backends.mkldnn.matmul)


def _precisions() -> tuple[Any, ...]:
    """Return what the older settings, two of them, and the newer ones say."""
    if not (places := _places()):
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    # To ask for the older is an error where a user has set the newer: what they must have been.
    conv, _, product, _, here = newer = tuple(place.fp32_precision for place in places)
    older = "medium" if here == "bf16" else "high" if product == "tf32" else "highest"
    return conv == "tf32", older, *newer


def _set_precisions(wanted: tuple[Any, ...]) -> None:
    conv, product, *newer = wanted
    torch.backends.cudnn.allow_tf32 = conv
    torch.set_float32_matmul_precision(product)
    for place, precision in zip(_places(), newer, strict=True):
        place.fp32_precision = precision


@torch.no_grad()
@exact_float32()
def _rewritten(
    network: nn.Module, rewrites: Sequence[Callable[[nn.Module, Tensor], None]], probe: Tensor
) -> nn.Module:
    """Return a rewritten copy, without what changes what the network gives for `probe`."""
    wanted, kept = network(probe), copy.deepcopy(network)
    for rewrite in rewrites:
        tried = copy.deepcopy(kept)
        rewrite(tried, probe)
        if (tried(probe) - wanted).abs().max() < 1e-3 * wanted.std():
            kept = tried
    return kept


def _fold(network: nn.Module, probe: Tensor) -> None:
    """Fold batch normalisations into convolutions.

    Which convolution a normalisation follows is seen in one forward pass. torch.fx lost: while it
    traces, it replaces `nn.Module.__call__` for the whole process, where other threads run models.
    A convolution whose output is used twice, or before and after, cannot be folded.
    """
    outputs: list[tuple[Tensor, str]] = []  # held, so that no other tensor gets their identity
    pairs: list[tuple[str, str]] = []

    def saw(name: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.append((output, name))

    def takes(name: str) -> Callable[..., None]:
        return lambda _, args: pairs.extend((conv, name) for t, conv in outputs if t is args[0])

    hooks = []
    for name, module in network.named_modules():
        # Not their subclasses: some are activations as well.
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(saw(name)))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(takes(name)))
    network(probe)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        before = cast(nn.Conv2d, network.get_submodule(conv))
        after = cast(nn.BatchNorm2d, network.get_submodule(norm))
        network.set_submodule(conv, fuse_conv_bn_eval(before, after))
        network.set_submodule(norm, nn.Identity())


def _holds_weights(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_floating_point() for tensor in own)


# --- nearest upsampling, and the convolution after it --------------------------------------------


class UpsampledConv(nn.Module):
    """A 3x3 convolution of a map upsampled to twice its width, nearest, beside a skip connection.

    Each output pixel sees two by two pixels of the smaller map: the upsampling and its convolution
    are one transposed convolution of 4x4 with a stride of 2, of 4/9 of the multiplications, and
    neither the upsampled map nor what is concatenated from it and the skip connection is ever
    made.

    Parameters
    ----------
    conv
        3x3, stride 1, padded by one pixel of zeros.
    channels
        How many of its input channels are upsampled; they come first, the skip connection's after.
    """

    def __init__(self, conv: nn.Conv2d, channels: int):
        super().__init__()
        assert _is_plain(conv)
        # A row of the output has the kernel's rows w0, w1, w2 over rows -1, 0, 1 of the upsampled
        # map, which are two rows of the small one: an even row w0 and w1 + w2, an odd row w0 + w1
        # and w2. A transposed kernel k adds k[1] and k[3] up for even rows, k[2] and k[0] for odd.
        taps = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        weight = torch.einsum("ar,bs,oirs->ioab", taps, taps, conv.weight[:, :channels])
        self.up = nn.ConvTranspose2d(channels, conv.out_channels, 4, 2, 1)
        self.up.weight = nn.Parameter(weight.contiguous())
        self.up.bias = conv.bias
        self.skip: nn.Conv2d | None = None
        if beside := conv.in_channels - channels:
            self.skip = nn.Conv2d(beside, conv.out_channels, 3, 1, 1, bias=False)
            self.skip.weight = nn.Parameter(conv.weight[:, channels:].contiguous())

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return (n, channel, 2 y, 2 x) from (n, channel, y, x) and a skip of the output's size."""
        out: Tensor = self.up(x)
        return out if skip is None or self.skip is None else out.add_(self.skip(skip))


class _UpBlock(nn.Module):
    """A U-Net decoder's block of segmentation-models-pytorch, called as that is."""

    def __init__(self, block: nn.Module, channels: int):
        super().__init__()
        first, second = (cast(nn.Sequential, block.get_submodule(n)) for n in ("conv1", "conv2"))
        self.conv1 = UpsampledConv(cast(nn.Conv2d, first[0]), channels)
        self.rest = nn.Sequential(*list(first)[1:], second, block.get_submodule("attention2"))

    def forward(
        self,
        feature_map: Tensor,
        target_height: int,
        target_width: int,
        skip_connection: Tensor | None = None,
    ) -> Tensor:
        height, width = feature_map.shape[-2:]
        assert (target_height, target_width) == (2 * height, 2 * width)
        out: Tensor = self.rest(self.conv1(feature_map, skip_connection))
        return out


def _merge_upsampling(network: nn.Module, probe: Tensor) -> None:
    """Merge a U-Net's upsampling into the convolutions after it."""
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

    wanted = list(signature(_UpBlock.forward).parameters)[1:]
    seen: dict[str, int] = {}

    def saw(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.update({name: (*args, *kwargs.values())[0].shape[1]})

    hooks = []
    for name, block in network.named_modules():
        if not isinstance(block, UnetDecoderBlock):
            continue
        conv, attention = block.conv1[0], block.attention1.attention
        if (
            list(signature(block.forward).parameters) == wanted
            and block.interpolation_mode == "nearest"
            and isinstance(attention, nn.Identity)
            and _is_plain(conv)
        ):
            hooks.append(block.register_forward_pre_hook(saw(name), with_kwargs=True))
    network(probe)
    for hook in hooks:
        hook.remove()
    for name, channels in seen.items():
        network.set_submodule(name, _UpBlock(network.get_submodule(name), channels))


def _is_plain(conv: nn.Module) -> bool:
    """Return whether this is a 3x3 convolution of stride 1 that pads by one pixel of zeros."""
    return type(conv) is nn.Conv2d and (
        conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    ) == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # fmt: skip


# --- convolutions of many channels ---------------------------------------------------------------


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
    return inputs / largest, powers(kernel), powers(count - kernel + 1).T * largest.T


# F(4, 3). Of all points 0, a, -a, b, -b these round least: 0.6e-6 of the result's standard
# deviation, where 1 and 2, which are more usual, give 1.4e-6 and direct convolution 0.1e-6.
_INPUTS, _KERNEL, _OUTPUTS = _toom_cook((0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)), 3)


class WinogradConv(nn.Module):
    """A 3x3 convolution in tiles of 4x4 output pixels: 36 multiplications for 144.

    Tiles of 6x6 inputs are transformed (a product with a 36x36 matrix), multiplied by the
    transformed kernel (36 products of matrices of tiles by channels) and transformed back. What is
    no multiple of 4 pixels wide is convolved directly.

    Parameters
    ----------
    conv
        3x3, stride 1, padded by one pixel of zeros.

    Notes
    -----
    Winograd's minimal filtering as Lavin & Gray (2016, section 4) lay it out.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        assert _is_plain(conv)
        self.direct = conv
        weight = conv.weight.detach().double()
        kernel = torch.from_numpy(_KERNEL)
        there = torch.einsum("ai,bj,ocij->abco", kernel, kernel, weight).flatten(0, 1)
        self.weight = nn.Parameter(there.float().contiguous())
        for name, matrix in (("inputs", _INPUTS), ("outputs", _OUTPUTS)):
            square = torch.from_numpy(np.kron(matrix, matrix)).float()
            self.register_buffer(name, square, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channel, y, x), float32, from as many pixels; channels last in memory."""
        n, channels, height, width = x.shape
        if height % 4 or width % 4:
            out: Tensor = self.direct(x)
            return out
        down, across = height // 4, width // 4
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        image, row, column, _ = padded.stride()
        tiles = padded.as_strided(
            (6, 6, n, down, across, channels), (row, column, image, 4 * row, 4 * column, 1)
        )
        made = x.new_empty(n, height, width, self.direct.out_channels)
        places = made.view(n, down, 4, across, 4, -1).permute(2, 4, 0, 1, 3, 5)
        rows = max(1, _TILES // across)
        images = max(1, _TILES // (across * down))
        for i in range(0, n, images):
            for y in range(0, down, rows):
                part = tiles[:, :, i : i + images, y : y + rows]
                place = places[:, :, i : i + images, y : y + rows]
                seen = self.inputs @ part.reshape(36, -1)
                product = torch.bmm(seen.view(36, -1, channels), self.weight)
                result = (self.outputs @ product.view(36, -1)).view(place.shape)
                if self.direct.bias is None:
                    place.copy_(result)
                else:
                    torch.add(result, self.direct.bias, out=place)
        return made.permute(0, 3, 1, 2)


def _winograd(network: nn.Module, probe: Tensor) -> None:
    """Do convolutions of many channels with fewer multiplications."""
    for name, conv in list(network.named_modules()):
        if _is_plain(conv) and min(conv.in_channels, conv.out_channels) >= _WINOGRAD_CHANNELS:
            network.set_submodule(name, WinogradConv(conv))
