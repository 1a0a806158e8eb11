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

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from deepdem.convolution import LANES, NarrowConv, WinogradConv
from deepdem.models import ModelSpec, ResidualNet

__all__ = ["UpsampledConv", "exact", "for_inference"]

# Input channels of an upsampled map, with more of which `WinogradConv` has more to load than it
# saves, and output channels with which `NarrowConv` is faster.
_MOST_UPSAMPLED, _NARROW = 64, 2
# A network that takes any multiple of 32 pixels is tried on these: a map of 2 at its deepest.
_PROBE_PX = 64


def for_inference(net: ResidualNet, *, bf16: bool = False, compiled: bool = False) -> ResidualNet:
    """Return a copy of the network that gives the same residuals faster and cannot be trained.

    Batch normalisation is folded into the convolution before it, which saves a pass over the
    activations. On a card, and on the CPU in float32, a U-Net's nearest upsampling is folded into
    the convolution after it (`UpsampledConv`); on the CPU in float32 3x3 convolutions are done with
    fewer multiplications (`deepdem.convolution`). The layout is the one in which convolutions are
    fastest.

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
        0.94 of the time of what is not; on an H100 0.73 in bfloat16, as much in float32.
    """
    device = next(net.parameters()).device
    rewrites = [_fold]
    if device.type == "cuda" or (device.type == "cpu" and not bf16):
        rewrites.append(_merge_upsampling)
    if device.type == "cpu" and not bf16 and not compiled:
        rewrites.append(_winograd)
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
def exact() -> Iterator[None]:
    """Let float32 be float32, and the same again the same bits, as long as any thread is within.

    As it comes, torch lets convolutions on a card round their inputs to ten bits (TF32), and a
    user may have allowed the like to matrix products, to bfloat16 on a CPU even: Lightning
    advises ``torch.set_float32_matmul_precision("medium")``. Both are off by 1e-3, centimetres
    of a residual of tens of metres. And on a card some ways to convolve add up in whatever order
    threads come, or are chosen by the clock (``benchmark``): what is resumed would differ from
    what was begun.

    These are settings of the process, not of a thread: whoever comes first changes them, and the
    last to leave puts back what was found.
    """
    global _within, _found
    with _lock:
        if not _within:
            _found = _settings()
            _set((False, True, False, "highest"), ["ieee" for _ in _places()])
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                _set(*_found)


def _places() -> tuple[Any, ...]:
    """Return where torch 2.9 and newer keep what float32 is."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return ()
    of_cuda = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    return (*of_cuda, backends.mkldnn.conv, backends.mkldnn.matmul)


def _settings() -> tuple[tuple[bool, bool, bool, str], list[str]]:
    """Return what the older settings say, and the newer."""
    cudnn, newer = torch.backends.cudnn, [place.fp32_precision for place in _places()]
    if newer:
        # To ask for the older is an error where a user has set the newer: what they must be.
        conv, _, product, _, here = newer
        tf32 = conv == "tf32"
        products = "medium" if here == "bf16" else "high" if product == "tf32" else "highest"
    else:
        tf32, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    return (tf32, cudnn.deterministic, cudnn.benchmark, products), newer


def _set(older: tuple[bool, bool, bool, str], newer: Sequence[str]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, products = older
    torch.set_float32_matmul_precision(products)
    for place, precision in zip(_places(), newer, strict=True):
        place.fp32_precision = precision


@torch.no_grad()
@exact()
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
        self.up: nn.Module = nn.ConvTranspose2d(channels, conv.out_channels, 4, 2, 1)
        self.up.weight = nn.Parameter(weight.contiguous())
        self.up.bias = conv.bias
        self.skip: nn.Module | None = None
        if beside := conv.in_channels - channels:
            self.skip = nn.Conv2d(beside, conv.out_channels, 3, 1, 1, bias=False)
            self.skip.weight = nn.Parameter(conv.weight[:, channels:].contiguous())

    @property
    def last(self) -> nn.Module:
        """What gives the result, of the upsampled map's convolution and the skip connection's."""
        return self.up if self.skip is None else self.skip

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return (n, channel, 2 y, 2 x) from (n, channel, y, x) and a skip of the output's size."""
        out: Tensor = self.up(x)
        if self.skip is None:
            return out
        if isinstance(self.skip, WinogradConv):
            return cast(Tensor, self.skip(skip, out))
        return out.add_(self.skip(skip))


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


# --- convolutions with fewer multiplications ------------------------------------------------------


class _BasicBlock(nn.Module):
    """A ResNet's basic block, its sum a matter of the second convolution."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.first = nn.Sequential(*(block.get_submodule(n) for n in ("conv1", "bn1", "relu")))
        self.second = cast(WinogradConv, block.get_submodule("conv2"))
        self.second.relu = True
        self.beside = cast(nn.Module | None, block.downsample) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x), self.beside(x))
        return out


def _winograd(network: nn.Module, probe: Tensor) -> None:
    """Do 3x3 convolutions with fewer multiplications, and what comes after each along with it."""
    from torchvision.models.resnet import BasicBlock

    for name, module in list(network.named_modules()):
        if (kind := _faster(module)) is not None:
            network.set_submodule(name, kind(cast(nn.Conv2d, module)))
    for name, module in list(network.named_modules()):
        if (
            type(module) is BasicBlock
            and isinstance(module.conv2, WinogradConv)
            and isinstance(module.bn2, nn.Identity)
        ):
            network.set_submodule(name, _BasicBlock(module))
    for module in network.modules():
        if isinstance(module, _UpBlock):
            _take_relu(module.rest, module.conv1.last)
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _take_relu(module)


def _faster(module: nn.Module) -> type[WinogradConv] | type[NarrowConv] | None:
    """Return the kind of module that does the same convolution faster."""
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.in_channels % LANES:
        return None
    if _is_plain(module) and module.out_channels <= _NARROW:
        return NarrowConv
    doubles = (
        type(module) is nn.ConvTranspose2d
        and (module.kernel_size, module.stride, module.padding) == ((4, 4), (2, 2), (1, 1))
        and (module.output_padding, module.dilation, module.groups) == ((0, 0), (1, 1), 1)
        and module.in_channels <= _MOST_UPSAMPLED
    )
    fits = module.out_channels % LANES == 0
    return WinogradConv if fits and (doubles or _is_plain(module)) else None


def _take_relu(rest: nn.Sequential, before: nn.Module | None = None) -> None:
    """Leave ReLUs after convolutions to these."""
    for k, module in enumerate(rest):
        if type(module) is nn.ReLU and isinstance(before, WinogradConv):
            before.relu, rest[k] = True, nn.Identity()
        elif not isinstance(module, nn.Identity):
            before = module
