"""The networks and the model file: torch modules that know nothing of Dask, xarray or Lightning.

A newcomer adds an architecture here, in `ARCHITECTURES`. Whatever it is, `ResidualNet` wraps it:
raw layers with NaN go in, the residual in metres comes out, and all that lies between (centring,
scaling, what stands for no data) is in one place, the same in training and in inference.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deepdem.layers import describe, truths

__all__ = [
    "ARCHITECTURES",
    "ModelSpec",
    "ResidualNet",
    "build_network",
    "for_inference",
    "read_model",
    "serialise",
    "weights_hash",
    "write_model",
]

_FORMAT = 1
_KEY = "deepdem"


@dataclass(frozen=True)
class ModelSpec:
    """All that inference must know of a model besides its weights; plain JSON types.

    Attributes
    ----------
    layers
        The network's input layers, in order.
    target
        The truth it was trained for: ``lidar_dsm`` or ``lidar_dtm``.
    architecture, encoder
        Names as segmentation-models-pytorch has them.
    chip_size
        The width of the training chips and of inference windows, pixels.
    dsm_scale
        The DSM scale, metres; NaN until training starts.
    pixel_size
        The pixel size of the training scenes in metres; NaN until training starts.
    means, stds
        Of each layer that is not a height or a mask, over the training scenes; by name.
    uncertainty
        Whether a second output channel predicts the scale of a Laplace distribution.
    clip
        Standardised images and indices beyond this many standard deviations say no more; None:
        they are left as they are.
    options
        Further keywords of the architecture.
    training
        Where the model comes from: scene names, validation statistics, versions.
    """

    layers: tuple[str, ...]
    target: str = "lidar_dsm"
    architecture: str = "unet"
    encoder: str = "resnet18"
    chip_size: int = 256
    dsm_scale: float = math.nan
    pixel_size: float = math.nan
    means: Mapping[str, float] = field(default_factory=dict)
    stds: Mapping[str, float] = field(default_factory=dict)
    uncertainty: bool = False
    clip: float | None = 10.0
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "dsm" not in self.layers:
            raise ValueError(
                f"layers={list(self.layers)} lack 'dsm': the network repairs the initial DSM, so "
                "it must see it"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers={list(self.layers)} name a layer twice")
        if wrong := truths(self.layers):
            raise ValueError(f"layers={list(self.layers)} hold the truth {wrong}: leave it out")
        if describe(self.target).role != "truth":
            raise ValueError(f"target={self.target!r}: wanted 'lidar_dsm' or 'lidar_dtm'")
        if self.chip_size < 1 or self.chip_size % 32:
            raise ValueError(
                f"chip_size={self.chip_size}: the networks halve it five times, so it must be a "
                "multiple of 32"
            )

    @property
    def is_fitted(self) -> bool:
        """Whether the scale and the layers' statistics are known."""
        return math.isfinite(self.dsm_scale) and all(n in self.stds for n in self.standardised)

    @property
    def outputs(self) -> int:
        """How many channels the network gives: the residual, and its scale if asked for."""
        return 2 if self.uncertainty else 1

    @property
    def standardised(self) -> tuple[str, ...]:
        """The layers that are standardised by a mean and a standard deviation."""
        return tuple(n for n in self.layers if describe(n).role not in ("height", "mask"))


def _smp(spec: ModelSpec, weights: str | None) -> nn.Module:
    import segmentation_models_pytorch as smp

    try:
        network = smp.create_model(
            spec.architecture,
            encoder_name=spec.encoder,
            encoder_weights=weights,
            in_channels=len(spec.layers),
            classes=spec.outputs,
            **spec.options,
        )
    except KeyError as error:
        raise ValueError(
            f"encoder={spec.encoder!r} or architecture={spec.architecture!r} is not known to "
            f"segmentation-models-pytorch: {error}"
        ) from error
    assert isinstance(network, nn.Module)
    return network


class ResDepthUNet(nn.Module):
    """The U-Net of ResDepth (Stucker and Schindler, 2022), with its names of parameters.

    `depth` levels of one 3x3 convolution each; skips are added, not concatenated, so that the
    full resolution costs little. Without its outer skip: `ResidualNet` adds the initial DSM.

    Parameters
    ----------
    in_channels, out_channels
        How many layers it sees, and how many channels it gives.
    start_kernel, max_filter_depth
        Filters of the first level; they double from level to level up to the most.
    depth
        How often the resolution is halved.
    do_bn
        Whether there is batch normalisation; convolutions have a bias where there is none, if
        `bias_conv_layer` says so.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        *,
        start_kernel: int = 16,
        max_filter_depth: int = 512,
        depth: int = 4,
        do_bn: bool = True,
        bias_conv_layer: bool = True,
    ):
        super().__init__()
        widths = [min(start_kernel * 2**level, max_filter_depth) for level in range(depth + 1)]

        def block(before: int, after: int) -> nn.Sequential:
            conv = nn.Conv2d(before, after, 3, padding=1, bias=bias_conv_layer and not do_bn)
            norm = [nn.BatchNorm2d(after)] if do_bn else []
            return nn.Sequential(conv, *norm, nn.ReLU())

        befores = [in_channels, *widths[: depth - 1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(block(b, w), nn.MaxPool2d(2))
            for b, w in zip(befores, widths, strict=False)
        )
        self.bottleneck = block(widths[depth - 1], widths[depth])
        self.decoder = nn.ModuleList()
        below = widths[depth]
        for level in range(depth - 1, 0, -1):
            up = nn.ConvTranspose2d(below, widths[level], 2, stride=2)
            self.decoder.append(nn.Sequential(up, block(widths[level], widths[level - 1])))
            below = widths[level - 1]
        self.decoder.append(nn.ConvTranspose2d(below, widths[0], 2, stride=2))
        self.last_layer = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, output, y, x) of (n, layer, y, x)."""
        kept = []
        for level in self.encoder:
            assert isinstance(level, nn.Sequential)
            x = level[0](x)
            kept.append(x)
            x = level[1](x)
        x = self.bottleneck(x)
        for level in self.decoder:
            # The kept output is added between the transposed convolution and the block.
            up, block = (level[0], level[1]) if isinstance(level, nn.Sequential) else (level, None)
            x = up(x) + kept.pop()
            x = x if block is None else block(x)
        out: Tensor = self.last_layer(x)
        return out


def _resdepth(spec: ModelSpec, weights: str | None) -> nn.Module:
    if weights is not None:
        raise ValueError(f"encoder_weights={weights!r}: architecture 'resdepth' has none")
    return ResDepthUNet(len(spec.layers), spec.outputs, **spec.options)


#: Architectures by name: a function of the spec and the name of the encoder's weights. What is
#: not here is asked of segmentation-models-pytorch.
ARCHITECTURES: dict[str, Callable[[ModelSpec, str | None], nn.Module]] = {
    "unet": _smp,
    "resdepth": _resdepth,
}


def build_network(spec: ModelSpec, encoder_weights: str | None = None) -> nn.Module:
    """Return the bare network: (n, layer, y, x) standardised float32 to (n, output, y, x).

    Raises
    ------
    ValueError
        The architecture or the encoder is not known.
    """
    network = ARCHITECTURES.get(spec.architecture, _smp)(spec, encoder_weights)
    last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
    with torch.no_grad():
        # A residual that starts near zero: the first step improves the initial DSM rather than
        # repairing what a random head did to it.
        last.weight.mul_(0.1)
    return network


class ResidualNet(nn.Module):
    """A network that takes raw layers and gives the residual in metres.

    NaN is resolved here and nowhere else: heights are centred on the chip's own mean over its
    valid pixels and divided by the DSM scale, images and indices are standardised by the
    training scenes' statistics, and then NaN becomes 0, the mean.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.network = build_network(spec) if network is None else network
        self._dsm = spec.layers.index("dsm")
        self._heights = [i for i, n in enumerate(spec.layers) if describe(n).is_height]
        self._others = [i for i, n in enumerate(spec.layers) if n in spec.standardised]
        # Set by `for_inference`: whether convolutions run in bfloat16, and their weights' type.
        self.bf16, self.weights_dtype = False, torch.float32

    def standardise(self, x: Tensor) -> Tensor:
        """Return what the network sees: float32 of about unit variance, without NaN.

        Parameters
        ----------
        x
            (n, layer, y, x) float32, raw units, NaN for no data; it is not changed.
        """
        spec = self.spec
        dsm = x[:, self._dsm]
        z = x.clone()
        finite = torch.isfinite(dsm)
        # Summed from the lowest pixel up: at 2000 m a float32 sum of heights would lose decimetres.
        lowest = torch.where(finite, dsm, torch.inf).amin(dim=(1, 2), keepdim=True)
        above = torch.where(finite, dsm - lowest, 0.0).sum(dim=(1, 2), keepdim=True)
        centre = (lowest + above / finite.sum(dim=(1, 2), keepdim=True).clamp(min=1))[:, None]
        z[:, self._heights] = (x[:, self._heights] - centre) / spec.dsm_scale
        if self._others:
            names = [spec.layers[i] for i in self._others]
            mean = x.new_tensor([spec.means[n] for n in names])[:, None, None]
            std = x.new_tensor([spec.stds[n] for n in names])[:, None, None]
            others = (x[:, self._others] - mean) / std
            z[:, self._others] = (
                others if spec.clip is None else others.clamp(-spec.clip, spec.clip)
            )
        return torch.nan_to_num_(z, nan=0.0, posinf=0.0, neginf=0.0)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual and, if the network predicts it, the Laplace scale; metres, float32.

        Parameters
        ----------
        x
            (n, layer, y, x) raw layers in the order of ``spec.layers``, NaN for no data. Centring
            and scaling are float32, whatever the convolutions are.

        Returns
        -------
        tuple of Tensor
            Refined minus initial, (n, y, x); the scale b of its distribution, (n, y, x), or None.
        """
        z = self.standardise(x)
        with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            out = self.network(z.to(self.weights_dtype))
        out = out.float()
        residual: Tensor = out[:, 0] * self.spec.dsm_scale
        if not self.spec.uncertainty:
            return residual, None
        # Between e^-7 and e^2 of the DSM scale: a centimetre to a hundred metres for one of 10 m.
        return residual, torch.exp(out[:, 1].clamp(-7, 2)) * self.spec.dsm_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual, refined minus initial, metres: (n, layer, y, x) to (n, y, x).

        Parameters
        ----------
        x
            Raw layers in the order of ``spec.layers``, float32, NaN for no data.
        """
        return self.moments(x)[0]


def for_inference(net: ResidualNet, *, bf16: bool = False) -> ResidualNet:
    """Return a copy of the network that gives the same residuals faster and cannot be trained.

    Batch normalisation is folded into the convolution before it, which saves a pass over the
    activations, and the layout is the one in which convolutions are fastest.

    Parameters
    ----------
    net
        In evaluation mode, on the device where it will run; it is not changed.
    bf16
        Whether convolutions run in bfloat16. Where nothing but convolutions and linear layers
        holds weights once all is folded, so are the weights: autocast would convert them for
        each batch anew. Elsewhere it is autocast, which keeps normalisations in float32.
    """
    size = net.spec.chip_size
    probe = torch.randn((1, len(net.spec.layers), size, size), generator=torch.Generator())
    network = _folded(net.network, probe.to(next(net.parameters()).device))
    fast = ResidualNet(net.spec, network.to(memory_format=torch.channels_last))
    linear = (nn.modules.conv._ConvNd, nn.Linear)
    if bf16 and all(isinstance(m, linear) for m in network.modules() if _holds_weights(m)):
        fast.network.bfloat16()
        fast.weights_dtype = torch.bfloat16
    fast.bf16 = bf16
    return fast.eval().requires_grad_(False)


@torch.no_grad()
def _folded(network: nn.Module, probe: Tensor) -> nn.Module:
    """Return a copy with batch normalisations folded into convolutions, checked on `probe`.

    Which convolution a normalisation follows is seen in one forward pass. torch.fx lost: while it
    traces, it replaces `nn.Module.__call__` for the whole process, where other threads run models.
    """
    folded = copy.deepcopy(network)
    outputs: list[tuple[Tensor, str]] = []  # held, so that no other tensor gets their identity
    pairs: list[tuple[str, str]] = []

    def saw(name: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.append((output, name))

    def takes(name: str) -> Callable[..., None]:
        return lambda _, args: pairs.extend((conv, name) for t, conv in outputs if t is args[0])

    hooks = []
    for name, module in folded.named_modules():
        # Not their subclasses: some are activations as well.
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(saw(name)))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(takes(name)))
    wanted = folded(probe)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        before = cast(nn.Conv2d, folded.get_submodule(conv))
        after = cast(nn.BatchNorm2d, folded.get_submodule(norm))
        folded.set_submodule(conv, fuse_conv_bn_eval(before, after))
        folded.set_submodule(norm, nn.Identity())
    off = (folded(probe) - wanted).abs().max() / wanted.std()
    # A convolution whose output is used twice, or before and after, cannot be folded.
    return folded if off < 1e-3 else copy.deepcopy(network)


def _holds_weights(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_floating_point() for tensor in own)


def weights_hash(net: ResidualNet) -> str:
    """Return a hash of the weights and of all in the spec that changes what they give."""
    digest = hashlib.sha256()
    numbers = replace(net.spec, training={})
    digest.update(json.dumps(asdict(numbers), sort_keys=True, default=str).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _metadata(spec: ModelSpec) -> dict[str, str]:
    versions = {p: version(p) for p in ("torch", "segmentation-models-pytorch", "xarray")}
    content = {"format": _FORMAT, "spec": asdict(spec), "versions": versions}
    return {_KEY: json.dumps(content, allow_nan=True)}


def serialise(net: ResidualNet) -> bytes:
    """Return the model file's bytes: safetensors with the spec as JSON metadata."""
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    return safetensors.torch.save(state, metadata=_metadata(net.spec))


def write_model(net: ResidualNet, path: str | PathLike[str]) -> None:
    """Write the model file; it appears whole or not at all."""
    target = Path(path)
    if not net.spec.is_fitted:
        raise ValueError(
            "the model has no DSM scale yet: train it, or pass dsm_scale= and fit it to scenes"
        )
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(serialise(net))
    part.replace(target)


def read_model(source: str | PathLike[str] | bytes) -> ResidualNet:
    """Return the network of a model file, in evaluation mode; nothing in the file is executed.

    Parameters
    ----------
    source
        A path, a URL that fsspec knows, or the file's bytes.

    Raises
    ------
    ValueError
        The file is no model file, or a newer version's, or its weights do not fit its spec.
    FileNotFoundError
        There is no such file.
    """
    what = "the model file" if isinstance(source, bytes) else fspath(source)
    content = source if isinstance(source, bytes) else _read_bytes(what)
    spec = _spec_of(content, what)
    net = ResidualNet(spec)
    try:
        net.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"the weights in {what} do not fit its own description: {error}"
        ) from error
    return net.eval().requires_grad_(False)


def _read_bytes(path: str) -> bytes:
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            remote: bytes = file.read()
            return remote
    return Path(path).read_bytes()


def _spec_of(content: bytes, what: str) -> ModelSpec:
    # The header: its length in 8 bytes, then JSON (the safetensors format).
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        described = json.loads(header["__metadata__"][_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{what} is no deepdem model file (safetensors with a {_KEY!r} entry in its metadata)"
        ) from error
    if described["format"] > _FORMAT:
        raise ValueError(
            f"{what} has format {described['format']}, this version of deepdem reads up to "
            f"{_FORMAT}: upgrade deepdem"
        )
    known = ModelSpec.__dataclass_fields__
    if strange := set(described["spec"]) - set(known):
        raise ValueError(f"{what} describes the model by {sorted(strange)}, which is not known")
    values = {**described["spec"], "layers": tuple(described["spec"]["layers"])}
    values["training"] = {**values.get("training", {}), "versions": described.get("versions", {})}
    return ModelSpec(**values)
