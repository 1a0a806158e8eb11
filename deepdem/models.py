"""The networks: torch modules that know nothing of Dask, xarray or Lightning.

A newcomer adds an architecture here, in `ARCHITECTURES`. Whatever it is, `ResidualNet` wraps it:
raw layers with NaN go in, the residual in metres comes out, and all that lies between (centring,
scaling, what stands for no data) is in one place, the same in training and in inference.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepdem.layers import describe, truths

__all__ = [
    "ARCHITECTURES",
    "CENTERINGS",
    "INTERVALS",
    "OWN",
    "ModelSpec",
    "ResidualNet",
    "build_network",
    "wrap_network",
]

#: The architecture of a network that the user brings along; see `wrap_network`.
OWN = "own"
#: The half-width of the intervals that hold 68 % and 95 % of a Laplace distribution, in its
#: standard deviations sqrt(2) b: -log(1 - share) / sqrt(2).
INTERVALS = {name: -math.log(1 - share) / math.sqrt(2) for name, share in
             (("68", 0.68), ("95", 0.95))}  # fmt: skip
_MOST_LAYERS, _MOST_PX = 64, 8192

#: What heights are relative to: the mean of the chip or window, or the scene's local level.
CENTERINGS = ("chip", "local")
# All networks halve their input at most so often; what a pixel tells them depends on its place
# within a block of that width.
_BLOCK_PX = 32
# A network in which a pixel is felt from further away counts as one that sees all of a window.
_FAR_PX = 1024


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
        The width of the training chips, pixels.
    centering
        What heights are relative to: ``"chip"``, the mean of the chip (or of the window, which
        must then be as wide as a chip), or ``"local"``, the local level of the scene.
    reach_px
        How far at most a pixel is felt in the output, counted from the aligned block of 32 pixels
        that it lies in: what a window's edge does to a result ends there. Infinite where it is
        felt in all of a window (pooling over the window, attention); None: not measured.
    dsm_scale
        The DSM scale, metres; NaN until training starts.
    pixel_size
        The pixel size of the training scenes in metres; NaN until training starts.
    means, stds
        Of each layer that is not a height or a mask, over the training scenes; by name.
    uncertainty
        Whether a second output channel predicts the scale of a Laplace distribution.
    temperature
        What that scale is multiplied by, fitted to validation chips.
    intervals
        The half-widths of the intervals that hold 68 % and 95 % of the errors, in standard
        deviations; those of a Laplace distribution until they are fitted.
    tta_intervals
        The same where windows are seen in their symmetries; empty until they are fitted.
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
    temperature: float = 1.0
    intervals: Mapping[str, float] = field(default_factory=lambda: dict(INTERVALS))
    clip: float | None = 10.0
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    centering: str = "chip"
    reach_px: float | None = None
    tta_intervals: Mapping[str, float] = field(default_factory=dict)

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
        if self.centering not in CENTERINGS:
            raise ValueError(f"centering={self.centering!r}: pass 'chip' or 'local'")
        if not 0 < self.chip_size <= _MOST_PX or self.chip_size % _BLOCK_PX:
            raise ValueError(
                f"chip_size={self.chip_size}: the networks halve it five times, so it must be a "
                f"multiple of 32, and {_MOST_PX} at most"
            )
        if len(self.layers) > _MOST_LAYERS:
            raise ValueError(f"{len(self.layers)} layers: at most {_MOST_LAYERS} are possible")
        for what in ("architecture", "encoder"):
            # timm would take "hf-hub:…" or "local-dir:…" as an order to fetch something.
            if not re.fullmatch(r"[\w.+-]+", getattr(self, what)):
                raise ValueError(f"{what}={getattr(self, what)!r} is no name of a network")
        self._check_numbers()

    def _check_numbers(self) -> None:
        numbers = {"dsm_scale": self.dsm_scale, "pixel_size": self.pixel_size,
                   "temperature": self.temperature, "clip": self.clip,
                   **({} if self.reach_px in (None, math.inf) else {"reach_px": self.reach_px}),
                   **{f"intervals[{n!r}]": self.intervals.get(n) or 0.0 for n in INTERVALS},
                   **{f"tta_intervals[{n!r}]": v for n, v in self.tta_intervals.items()},
                   **{f"stds[{n!r}]": v for n, v in self.stds.items()}}  # fmt: skip
        for name, value in numbers.items():
            unknown = value is None or (name in ("dsm_scale", "pixel_size") and math.isnan(value))
            if not unknown and not 0 < (value or 0) < math.inf:
                raise ValueError(f"{name}={value}: wanted a positive, finite number")
        if self.tta_intervals and set(self.tta_intervals) != set(INTERVALS):
            raise ValueError(f"tta_intervals={dict(self.tta_intervals)}: wanted {list(INTERVALS)}")
        for name, value in self.means.items():
            if not math.isfinite(value):
                raise ValueError(f"means[{name!r}]={value}: wanted a finite number")

    def check_alike(self, other: ModelSpec, what: str, cure: str) -> None:
        """Refuse `what` if its spec is for another network than this one, or for other inputs."""
        for name in ("layers", "architecture", "encoder", "options", "uncertainty", "chip_size",
                     "centering"):  # fmt: skip
            wanted, given = getattr(self, name), getattr(other, name)
            if wanted != given:
                raise ValueError(
                    f"{what} is for {name}={given!r}, wanted {wanted!r}: pass {name} as it has "
                    f"it, or {cure}"
                )

    @property
    def is_fitted(self) -> bool:
        """Whether the scale and the layers' statistics are known."""
        known = all(n in self.stds and n in self.means for n in self.standardised)
        return math.isfinite(self.dsm_scale) and known

    @property
    def channels(self) -> tuple[str, ...]:
        """What a batch holds: the layers and, of a model with local centring, the level."""
        return (*self.layers, *(("dsm_level",) if self.centering == "local" else ()))

    @property
    def is_local(self) -> bool:
        """Whether a result depends on its surroundings alone, not on the window round them."""
        known = self.reach_px is not None and math.isfinite(self.reach_px)
        return self.centering == "local" and known

    @property
    def window_step(self) -> int:
        """Inference windows may be as wide as a chip, and wider by a multiple of this; 0: not."""
        return _BLOCK_PX if self.is_local else 0

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

    kind = smp.MODEL_ARCHITECTURES_MAPPING.get(spec.architecture)
    if kind is not None and not spec.encoder.startswith("tu-"):
        # Its encoders swallow any keyword; timm's refuse those that they do not know.
        known = set(inspect.signature(kind).parameters) - {"kwargs"}
        if strange := set(spec.options) - known:
            raise ValueError(
                f"options={sorted(strange)} do not fit architecture={spec.architecture!r}: it "
                f"knows {', '.join(sorted(known))}"
            )
    try:
        network = smp.create_model(
            spec.architecture,
            encoder_name=spec.encoder,
            encoder_weights=weights,
            in_channels=len(spec.layers),
            classes=spec.outputs,
            **spec.options,
        )
    except (KeyError, RuntimeError) as error:
        # timm raises RuntimeError for a name it does not know, and so may any constructor.
        if isinstance(error, RuntimeError) and "Unknown model" not in str(error):
            raise
        raise ValueError(_unknown(spec)) from error
    except TypeError as error:
        raise ValueError(
            f"options={dict(spec.options)} do not fit architecture={spec.architecture!r}: {error}"
        ) from error
    assert isinstance(network, nn.Module)
    return network


def _unknown(spec: ModelSpec) -> str:
    import segmentation_models_pytorch as smp

    known = [*smp.MODEL_ARCHITECTURES_MAPPING, *ARCHITECTURES]
    if spec.architecture not in known:
        return (
            f"architecture={spec.architecture!r} is not known: pass one of "
            f"{', '.join(sorted(set(known)))}"
        )
    near = difflib.get_close_matches(spec.encoder, smp.encoders.get_encoder_names(), 5)
    return (
        f"encoder={spec.encoder!r} is not known to segmentation-models-pytorch"
        + (f", nearest are {', '.join(near)}" if near else "")
        + "; timm's are called 'tu-' and timm's name"
    )


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
        if not 1 <= depth <= 10:
            raise ValueError(f"depth={depth}: wanted 1 to 10 halvings of the resolution")
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
    try:
        return ResDepthUNet(len(spec.layers), spec.outputs, **spec.options)
    except TypeError as error:
        raise ValueError(
            f"options={dict(spec.options)} do not fit architecture='resdepth': {error}"
        ) from error


def _own(spec: ModelSpec, weights: str | None) -> nn.Module:
    raise ValueError(
        f"the network is the user's own {spec.encoder!r}, which is not built from a name: make it "
        "and pass network="
    )


#: Architectures by name: a function of the spec and the name of the encoder's weights. What is
#: not here is asked of segmentation-models-pytorch.
ARCHITECTURES: dict[str, Callable[[ModelSpec, str | None], nn.Module]] = {
    "unet": _smp,
    "resdepth": _resdepth,
    OWN: _own,
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


def wrap_network(spec: ModelSpec, network: nn.Module) -> nn.Module:
    """Return the network after a look at what it makes of a chip.

    Raises
    ------
    ValueError
        It does not take (n, layer, y, x), or does not give (n, output, y, x).
    """
    if spec.architecture != OWN:
        return network
    weight = next(network.parameters(), torch.empty(0))
    chip = torch.zeros(2, len(spec.layers), spec.chip_size, spec.chip_size, device=weight.device)
    wanted = (2, spec.outputs, spec.chip_size, spec.chip_size)
    training = network.training
    try:
        with torch.no_grad():
            given = tuple(network.eval()(chip).shape)
    except RuntimeError as error:
        raise ValueError(
            f"network={spec.encoder} does not take a batch {tuple(chip.shape)} of the layers "
            f"{list(spec.layers)}: {error}"
        ) from error
    finally:
        network.train(training)
    if given != wanted:
        raise ValueError(
            f"network={spec.encoder} gives {given} of a batch {tuple(chip.shape)}, wanted {wanted}"
            + (": the residual, and the logarithm of its scale" if spec.uncertainty else "")
        )
    return network


class ResidualNet(nn.Module):
    """A network that takes raw layers and gives the residual in metres.

    NaN is resolved here and nowhere else: heights are centred (on the chip's own mean over its
    valid pixels, or on the local level that the batch brings along) and divided by the DSM scale,
    images and indices are standardised by the training scenes' statistics, and then NaN becomes
    0, the mean.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.network = build_network(spec) if network is None else wrap_network(spec, network)
        if spec.centering == "local" and spec.reach_px is None:
            self.spec = replace(spec, reach_px=_reach_px(spec, self.network))
        self._dsm = spec.layers.index("dsm")
        #: Where the heights are among the layers.
        self.heights = [i for i, n in enumerate(spec.layers) if describe(n).is_height]
        # Set by `for_inference`: whether convolutions run in bfloat16, and their weights' type.
        self.bf16, self.weights_dtype = False, torch.float32

    def standardise(self, x: Tensor) -> Tensor:
        """Return what the network sees: float32 of about unit variance, without NaN.

        Parameters
        ----------
        x
            (n, channel, y, x) float32, raw units, NaN for no data; channels as in
            ``spec.channels``. It is not changed.
        """
        spec = self.spec
        if x.shape[1] != len(spec.channels):
            raise ValueError(
                f"a batch of {x.shape[1]} channels, wanted {list(spec.channels)} "
                "('dsm_level' is what deepdem.level.local_level gives)"
            )
        centre = self.centre(x[:, self._dsm], x[:, -1])
        z = torch.empty_like(x[:, : len(spec.layers)])
        for i in range(len(spec.layers)):
            z[:, i] = self.plain(i, x[:, i], centre)
        return z

    def centre(self, dsm: Tensor, level: Tensor) -> Tensor:
        """Return what heights are relative to in windows, metres.

        Parameters
        ----------
        dsm, level
            (n, y, x): the initial DSM, NaN for no data, and the local level; what the model does
            not ask for does not matter.
        """
        return _own_mean(dsm) if self.spec.centering == "chip" else level

    def plain(self, layer: int, values: Tensor, base: Tensor | float) -> Tensor:
        """Return what the network sees of a layer: standardised, float32, 0 where it has no data.

        Parameters
        ----------
        layer
            Its place among ``spec.layers``.
        values
            Raw units, NaN for no data; any shape and any real type.
        base
            What heights are relative to, metres; other layers do not care.
        """
        name, spec, raw = self.spec.layers[layer], self.spec, values.to(torch.float32)
        if layer in self.heights:
            z = (raw - base).div_(spec.dsm_scale)
        elif name in spec.standardised:
            z = (raw - spec.means[name]).div_(spec.stds[name])
            if spec.clip is not None:
                z.clamp_(-spec.clip, spec.clip)
        else:
            return torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
        return torch.nan_to_num_(z, nan=0.0, posinf=0.0, neginf=0.0)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual and, if the network predicts it, the Laplace scale; metres, float32.

        Parameters
        ----------
        x
            (n, channel, y, x) raw layers in the order of ``spec.channels``, NaN for no data.
            Convolutions run as `for_inference` made them, or as the surrounding autocast says,
            such as a Lightning Trainer's. Centring and scaling are float32 in any case.

        Returns
        -------
        tuple of Tensor
            Refined minus initial, (n, y, x); the scale b of its distribution, (n, y, x), or None.
        """
        return self.moments_of(self.standardise(x))

    def moments_of(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `moments` gives, of layers that are standardised: (n, layer, y, x)."""
        kind = z.device.type
        half = torch.autocast(kind, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        with half:
            out = self.network(z.to(self.weights_dtype))
        out = out.float()
        residual: Tensor = out[:, 0] * self.spec.dsm_scale
        if not self.spec.uncertainty:
            return residual, None
        # Between e^-7 and e^2 of the DSM scale: a centimetre to a hundred metres for one of 10 m.
        scale = torch.exp(out[:, 1].clamp(-7, 2)) * self.spec.dsm_scale
        return residual, scale * self.spec.temperature

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual, refined minus initial, metres: (n, channel, y, x) to (n, y, x).

        Parameters
        ----------
        x
            Raw layers in the order of ``spec.channels``, float32, NaN for no data.
        """
        return self.moments(x)[0]


def _own_mean(dsm: Tensor) -> Tensor:
    """Return the mean height of each chip (n, y, x), as (n, 1, 1)."""
    finite = (dsm * 0).eq_(0).sum(dim=(1, 2), keepdim=True)  # isfinite takes ten times as long
    # Summed from the lowest pixel up: at 2000 m a float32 sum of heights would lose decimetres.
    inf = torch.inf
    lowest = torch.nan_to_num(dsm, nan=inf, posinf=inf, neginf=inf).amin(dim=(1, 2), keepdim=True)
    above = torch.nan_to_num_(dsm - lowest, nan=0.0, posinf=0.0, neginf=0.0)
    return lowest + above.sum(dim=(1, 2), keepdim=True) / finite.clamp(min=1)


@torch.inference_mode()
def _reach_px(spec: ModelSpec, network: nn.Module) -> float:
    """Return how far a pixel is felt in the output of a bare network; inf: in all of a window.

    Measured with what nothing can hold back: a block of NaN in a strip of zeros. Distances are
    from the block's edges (see `ModelSpec.reach_px`), the larger of both directions and axes.
    """
    training = network.training
    weight = next(network.parameters(), torch.empty(0))
    width = spec.chip_size if spec.architecture == OWN else _BLOCK_PX
    shape = 1, len(spec.layers), width, 2 * _FAR_PX + _BLOCK_PX
    strip = torch.zeros(shape, device=weight.device)
    strip[..., _FAR_PX : _FAR_PX + _BLOCK_PX] = torch.nan
    network.eval()
    try:
        felt = network(strip).isnan().any(dim=1)[0].any(dim=0)
        felt |= network(strip.mT).isnan().any(dim=1)[0].any(dim=1)
    except RuntimeError:
        # A network that takes chips and nothing else, such as one with positions for its pixels.
        return math.inf
    finally:
        network.train(training)
    places = felt.nonzero()
    far = max(_FAR_PX - int(places.min()), int(places.max()) + 1 - _FAR_PX - _BLOCK_PX)
    return math.inf if far >= _FAR_PX else float(far)
