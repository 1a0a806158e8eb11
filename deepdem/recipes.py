"""How a network is trained: losses, schedules, weight averages, and the presets that name them.

Torch functions and settings; what Lightning does with them is in `deepdem.train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as Norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = [
    "LOSSES",
    "PRESETS",
    "SCALE_LOSSES",
    "WARM_STEPS",
    "Calibration",
    "ChipSample",
    "Norm",
    "Recipe",
    "averaged",
    "fit_calibration",
    "flat",
    "half_widths",
    "moving_norms",
    "recipe_of",
    "settle",
    "warm_cosine",
]

#: Takes the error (n, y, x) in units of the DSM scale, 0 where it is not usable; where it is
#: (bool); and the predicted Laplace scale in the same units, or None. Gives one number.
Loss: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


# --- losses --------------------------------------------------------------------------------------


def _mean(values: Tensor, usable: Tensor) -> Tensor:
    """Return the mean over usable pixels: 0 where there is none, with a gradient of 0."""
    return torch.where(usable, values, 0.0).sum() / usable.sum().clamp(min=1)


def _l1(error: Tensor, usable: Tensor, scale: Tensor | None) -> Tensor:
    return _mean(error.abs(), usable)


def _huber(error: Tensor, usable: Tensor, scale: Tensor | None) -> Tensor:
    # Quadratic within 0.05 of the DSM scale: half a metre where a chip spans ten.
    zero = torch.zeros_like(error)
    values = torch.nn.functional.huber_loss(error, zero, reduction="none", delta=0.05)
    return _mean(values, usable)


def _slopes(error: Tensor, usable: Tensor) -> Tensor:
    """Return the mean step of the error between neighbours that are both usable."""
    down = _mean((error[:, 1:] - error[:, :-1]).abs(), usable[:, 1:] & usable[:, :-1])
    across = _mean((error[..., 1:] - error[..., :-1]).abs(), usable[..., 1:] & usable[..., :-1])
    return 0.5 * (down + across)


def _l1_slope(error: Tensor, usable: Tensor, scale: Tensor | None) -> Tensor:
    return _l1(error, usable, None) + _slopes(error, usable)


def _laplace(error: Tensor, usable: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    return _mean(error.abs() / scale + torch.log(2 * scale), usable)


def _beta_laplace(error: Tensor, usable: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    # The weight takes the 1 / b out of the error's gradient, which is then that of L1; the
    # scale's stays zero at b = abs(e).
    weight = scale.detach()
    return _mean(weight * (error.abs() / scale + torch.log(2 * scale)), usable)


#: Losses by name. A pixel without DSM or truth, or a chip of them, counts as nothing.
#: "l1_slope" adds the error of the slopes, along both axes, to the error of the heights (Hu et
#: al., 2019, equation 5, without their logarithm). "laplace" is the negative log-likelihood of a
#: Laplace distribution, abs(e) / b + log 2b (Kendall and Gal, 2017, equation 8, for the L1 norm).
#: "beta_laplace" weights it by the predicted b, so that pixels with large errors are learned as
#: fast as the others (Seitzer et al., 2022, equation 4, with beta = 1).
LOSSES: dict[str, Loss] = {
    "l1": _l1, "huber": _huber, "l1_slope": _l1_slope, "laplace": _laplace,
    "beta_laplace": _beta_laplace,
}  # fmt: skip
#: Those that train a predicted scale, the default first.
SCALE_LOSSES = ("beta_laplace", "laplace")


# --- recipes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; plain types.

    Attributes
    ----------
    optimizer
        ``"adamw"`` or ``"adam"``.
    learning_rate, weight_decay
        The optimizer's.
    schedule
        ``"cosine"``: up over the first 5 % of training, then down to zero as a cosine. Training is
        as long as the Trainer's ``max_epochs``, ``max_steps`` or ``max_time``. ``"plateau"``:
        halved after 50 epochs without a tenth less validation loss. ``"step"``: a tenth every 200
        epochs. ``"constant"``. ``"flat"``: up as the cosine, then level, and down to zero over the
        last 30 % (the trapezoid of Zhai et al., 2022): a training that is short for its data
        spends most of it at the full rate.
    loss
        A name from `LOSSES`.
    ema
        The decay a step of the moving average of the weights that is validated and saved; 0: the
        weights themselves.
    augment
        What `ChipDataModule` does to training chips if it is not told otherwise.
    centering
        What heights are relative to, ``"local"`` or ``"chip"``; see `ModelSpec`.
    """

    optimizer: str = "adamw"
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    schedule: str = "flat"
    loss: str = "l1_slope"
    ema: float = 0.0
    augment: tuple[str, ...] = ()
    centering: str = "local"

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known: pass one of {sorted(known)}"
                )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: wanted a decay of at least 0 and less than 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: wanted more than 0")


_KNOWN: dict[str, Any] = {
    "optimizer": ("adamw", "adam"),
    "schedule": ("flat", "cosine", "plateau", "step", "constant"),
    "loss": LOSSES,
    "centering": ("local", "chip"),
}

#: Recipes by name. "deepdem2024" is the published DeepDEM's, "resdepth" that of ResDepth
#: (Stucker and Schindler, 2022): their settings, run by our code.
PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "deepdem2024": Recipe(
        "adam", 5e-4, 0.0, "plateau", "l1", augment=("flip", "swap"), centering="chip"
    ),
    "resdepth": Recipe(
        "adam", 2e-4, 1e-5, "step", "l1", augment=("flip", "rotate"), centering="chip"
    ),
}


def recipe_of(preset: str, **changes: Any) -> Recipe:
    """Return a preset with changes; None leaves an entry as it is.

    Raises
    ------
    ValueError
        The preset is not known, or an entry cannot be.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not known: pass one of {sorted(PRESETS)}")
    wanted = {name: value for name, value in changes.items() if value is not None}
    assert set(wanted) <= {f.name for f in fields(Recipe)}
    return replace(PRESETS[preset], **wanted)


# --- schedules and averages ----------------------------------------------------------------------


#: However short a training, the full learning rate is not reached sooner: normalisations have seen
#: too little by then, and a training of a dozen steps went off by kilometres.
WARM_STEPS = 50


def warm_cosine(progress: float, warm: float = 0.05) -> float:
    """Return the share of the learning rate after `progress` (0 to 1) of the training."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def averaged(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Return the step of an exponential moving average that forgets its beginning.

    The decay grows as (1 + n) / (10 + n) to the one asked for, so that a short training is
    not averaged with the random weights that it began with. The averages are changed in place.
    """

    def step(averages: list[Tensor], now: list[Tensor], count: Tensor) -> None:
        n = float(count)
        update = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))  # type: ignore[no-untyped-call]  # torch's
        update(averages, now, count)

    return step


def flat(progress: float, warm: float = 0.05, down: float = 0.3) -> float:
    """Return the share of the learning rate after `progress` (0 to 1) of the training."""
    if progress < 1 - down:
        return max(min(progress / warm, 1.0), 0.02)
    return max(1 - progress, 0.0) / down


# --- normalisations ------------------------------------------------------------------------------

# What a sample of chips holds at most: pixels, but so many chips in any case.
_SAMPLE_PX, _SAMPLE_CHIPS = 2**21, 16


class ChipSample:
    """A sample of the chips that a training has seen, each as likely as any other.

    32 chips of 256 pixels, 512 of 64. Algorithm R of Vitter (1985): nothing is read again, and
    how many chips will come need not be known.
    """

    def __init__(self) -> None:
        self._chips: list[Tensor] = []
        self._seen = self._together = 0
        self._draw = np.random.default_rng(0)

    def add(self, chips: Tensor) -> None:
        """Take in a batch (n, channel, y, x)."""
        most = max(_SAMPLE_PX // (chips.shape[-2] * chips.shape[-1]), _SAMPLE_CHIPS)
        self._together = max(self._together, len(chips))
        for chip in chips:
            self._seen += 1
            at = len(self._chips) if self._seen <= most else int(self._draw.integers(self._seen))
            if at < most:
                self._chips[at : at + 1] = [chip.clone()]

    def batches(self) -> Iterator[Tensor]:
        """Yield the sample in batches as large as those that came, mixed."""
        order = np.random.default_rng(1).permutation(len(self._chips))
        for begin in range(0, len(order), self._together or 1):
            yield torch.stack([self._chips[i] for i in order[begin : begin + self._together]])


def moving_norms(network: nn.Module) -> list[Norm]:
    """Return the batch normalisations whose running statistics training moves; no frozen ones."""
    return [m for m in network.modules()
            if isinstance(m, Norm) and m.training and m.track_running_stats]  # fmt: skip


@torch.no_grad()
def settle(
    norms: Sequence[Norm], forward: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> None:
    """Take the running statistics of normalisations anew, as means over batches.

    Running statistics lag behind the weights and remember how they began: a training of a dozen
    steps was tens of metres off for it. Means over some batches with the weights as they are in the
    end say what the network's activations are (Wu and Johnson, 2021, section 3.2, "PreciseBN").

    Parameters
    ----------
    norms
        Those to settle; all else stays in the mode it is in.
    forward
        The network.
    batches
        What it is shown; none: nothing is changed.
    """
    before = [(norm.momentum, norm.training) for norm in norms]
    for number, batch in enumerate(batches, start=1):
        for norm in norms:
            norm.momentum = 1 / number  # a mean; the first batch replaces what was there
            norm.train()
        forward(batch)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.train(training)
        for buffer in (norm.running_mean, norm.running_var):
            _mean_over_processes(buffer)


def _mean_over_processes(tensor: Tensor | None) -> None:
    spread = torch.distributed
    if tensor is not None and spread.is_available() and spread.is_initialized():
        spread.all_reduce(tensor)
        tensor /= spread.get_world_size()


# --- calibration ---------------------------------------------------------------------------------

# The shares that intervals are to hold, and a Laplace distribution's half-widths in scales b.
_SHARES = {"68": 0.68, "95": 0.95}
_HALVES = {name: -math.log(1 - share) for name, share in _SHARES.items()}


@dataclass(frozen=True)
class Calibration:
    """What predicted scales are worth, as errors on validation chips show it.

    Attributes
    ----------
    temperature
        What all scales are to be multiplied by.
    intervals
        The half-widths that hold 68 % and 95 % of the errors then, in standard deviations
        sqrt(2) b.
    inside
        The shares that the intervals of a Laplace distribution hold then.
    """

    temperature: float
    intervals: dict[str, float]
    inside: dict[str, float]


def fit_calibration(ratio: Tensor) -> Calibration:
    """Return the calibration of predicted scales.

    One factor for all pixels (temperature scaling; Guo et al., 2017, for class probabilities),
    for which the shares inside the 68 % and the 95 % interval of a Laplace distribution are
    nearest to what they say, the worse of the two. Errors over their scales have another shape
    than that distribution, lighter or heavier in the tails, so that no factor makes both right:
    intervals are therefore taken from the errors themselves (split conformal prediction; Lei et
    al., 2018, section 2.2).

    Parameters
    ----------
    ratio
        Absolute errors over their predicted scales b, 1-D.
    """
    ordered = ratio.double().sort().values
    halves, says = (torch.tensor(list(d.values()), dtype=torch.float64) for d in (_HALVES, _SHARES))
    factors = torch.logspace(-1, 1, 801, dtype=torch.float64)
    inside = torch.searchsorted(ordered, factors[:, None] * halves) / len(ratio)
    best = int((inside - says).abs().amax(dim=1).argmin())
    factor = float(factors[best])
    return Calibration(
        factor,
        half_widths(ratio / (factor * math.sqrt(2))),
        dict(zip(_SHARES, inside[best].tolist(), strict=True)),
    )


def half_widths(ratio: Tensor) -> dict[str, float]:
    """Return which absolute errors over their standard deviations 68 % and 95 % are within."""
    ordered = ratio.double().sort().values
    return {name: max(float(ordered[int(share * (len(ordered) - 1))]), 1e-6)
            for name, share in _SHARES.items()}  # fmt: skip
