"""Training: a LightningModule as Lightning users know it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer, WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from deepdem.data import Batch, Statistics
from deepdem.inference import exact, for_inference
from deepdem.modelfile import read_model, write_model
from deepdem.models import OWN, ModelSpec, ResidualNet, build_network
from deepdem.monitor import ErrorStatistics, picture
from deepdem.predict import Prediction, predict, swapped_layers
from deepdem.recipes import (
    LOSSES,
    SCALE_LOSSES,
    WARM_STEPS,
    ChipSample,
    Norm,
    averaged,
    fit_calibration,
    flat,
    half_widths,
    moving_norms,
    recipe_of,
    settle,
    warm_cosine,
)

__all__ = ["DeepDEM", "load_model", "model_of"]

log = logging.getLogger(__name__)

# Before each validation normalisations see so many batches for a step since the last time: a
# forward pass takes a third of a step.
_SETTLING_SHARE, _FEWEST_BATCHES = 0.25, 16
# Intervals are fitted to so many pixels of each validation chip; those of symmetries to so many
# chips' worth of pixels.
_CHIP_SAMPLE, _VIEWED_PX = 1 << 12, 1 << 19


class DeepDEM(pl.LightningModule):
    """A network that repairs an initial DSM, to be trained with Lightning.

    Parameters
    ----------
    layers
        The input layers by name, ``dsm`` among them.
    target
        The truth it learns: ``lidar_dsm`` or ``lidar_dtm``.
    preset
        How it is trained, a name from `deepdem.recipes.PRESETS`: ``"default"``, ``"deepdem2024"``
        (the published DeepDEM's settings) or ``"resdepth"``. It also says how a `ChipDataModule`
        changes chips, unless that has an ``augment`` of its own.
    architecture, encoder
        Names as segmentation-models-pytorch has them, in lower case; timm's encoders are
        ``"tu-"`` and their name; ``architecture="resdepth"`` is ResDepth's U-Net.
    encoder_weights
        ``"imagenet"`` loads pretrained weights from a hub; None starts from scratch.
    network
        A module of your own instead: (n, layer, y, x) standardised layers to (n, 1, y, x), the
        residual in units of the DSM scale (with `uncertainty` (n, 2, y, x): and the logarithm of
        its scale). The model file keeps its weights, not its code: pass it again to `load_model`.
    chip_size
        The width of chips, a multiple of 32.
    centering
        What heights are relative to. ``"local"``: the local level, a smooth mean over about a
        chip that does not depend on where a chip lies; inference windows may be wide and overlap
        little. ``"chip"``: the mean of the chip, as in the published workflow; windows must then
        be as wide as a chip. None: what the preset says, ``"local"`` by default.
    dsm_scale
        Metres; None: computed from the training scenes when training starts.
    uncertainty
        Whether the network also predicts the scale b of a Laplace distribution of its error. It
        is then trained with ``loss="beta_laplace"``, or with ``"laplace"`` if that is asked for.
        When training ends, one factor for all scales and the half-widths of the 68 % and the 95 %
        interval are fitted to the validation chips; see `deepdem.recipes.fit_calibration`.
    weights
        A model file to start from: its weights, DSM scale and statistics, which are then kept.
    frozen_encoder
        Whether the encoder stays as it is, its running statistics included.
    loss, learning_rate, weight_decay, optimizer, schedule, ema
        What is to differ from the preset; see `deepdem.recipes.Recipe`.
    options
        Further keywords of the architecture, such as ``decoder_channels``.

    Raises
    ------
    ValueError
        Layers without ``dsm`` or with a truth, an unknown target, encoder, preset or loss, or a
        chip size that is no multiple of 32; a model file that is for other layers or another
        network.

    Examples
    --------
    >>> model = deepdem.DeepDEM(["dsm", "ortho_left", "ortho_right"], chip_size=128)
    >>> pytorch_lightning.Trainer(max_epochs=5).fit(model, data)
    >>> model.save("model.safetensors")
    """

    def __init__(
        self,
        layers: Sequence[str],
        target: str = "lidar_dsm",
        *,
        preset: str = "default",
        architecture: str = "unet",
        encoder: str = "resnet18",
        encoder_weights: str | None = None,
        network: nn.Module | None = None,
        chip_size: int = 256,
        centering: str | None = None,
        dsm_scale: float | None = None,
        uncertainty: bool = False,
        weights: str | None = None,
        frozen_encoder: bool = False,
        loss: str | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        optimizer: str | None = None,
        schedule: str | None = None,
        ema: float | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        changes = {"learning_rate": learning_rate, "weight_decay": weight_decay,
                   "optimizer": optimizer, "schedule": schedule, "ema": ema,
                   "centering": centering}  # fmt: skip
        self.recipe = recipe_of(preset, loss=_loss_of(loss, uncertainty), **changes)
        if network is not None:
            architecture, encoder = OWN, f"{type(network).__module__}.{type(network).__qualname__}"
        # Plain types only, so that torch.load(weights_only=True) reads a checkpoint. Weights that
        # training started from are in the checkpoint itself.
        self.save_hyperparameters(
            {
                "layers": list(layers), "target": target, "preset": preset,
                "architecture": architecture, "encoder": encoder, "encoder_weights": None,
                "chip_size": chip_size, "dsm_scale": dsm_scale, "uncertainty": uncertainty,
                "weights": None, "frozen_encoder": frozen_encoder, "loss": loss, **changes,
                "options": dict(options or {}),
            }
        )  # fmt: skip
        spec = ModelSpec(
            tuple(layers), target, architecture, encoder, chip_size,
            math.nan if dsm_scale is None else float(dsm_scale), uncertainty=uncertainty,
            options=dict(options or {}), centering=self.recipe.centering,
        )  # fmt: skip
        built = build_network(spec, encoder_weights) if network is None else network
        self.net = ResidualNet(spec, built)
        if weights is not None:
            self._start_from(weights)
        # Convolutions on the CPU and on tensor cores are faster in this layout.
        self.net.to(memory_format=torch.channels_last)
        self._frozen = False
        if frozen_encoder:
            self.freeze_encoder()
        self._seen = ErrorStatistics()
        self._sample, self._norms, self._settled_at = ChipSample(), list[Norm](), 0
        self._example: tuple[Tensor, Tensor, Tensor] | None = None

    def _start_from(self, path: str) -> None:
        own = self.net.network if self.spec.architecture == OWN else None
        other = read_model(path, network=own)
        self.spec.check_alike(
            other.spec, f"weights={path!r}", "go on from it with deepdem.load_model(path)"
        )
        self.net.load_state_dict(other.state_dict())
        self.net.requires_grad_(True)
        past = {**other.spec.training, "started_from": Path(path).name}
        self.net.spec = replace(other.spec, target=self.spec.target, training=past)

    @property
    def spec(self) -> ModelSpec:
        """What the model is, in plain types: layers, chip size, DSM scale, where it comes from."""
        return self.net.spec

    @property
    def layers(self) -> list[str]:
        """The input layers, in order."""
        return list(self.spec.layers)

    @property
    def dsm_scale(self) -> float | None:
        """The DSM scale in metres; None until training has started."""
        return None if math.isnan(self.spec.dsm_scale) else self.spec.dsm_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined heights, metres, float32.

        Parameters
        ----------
        x
            (n, channel, y, x) raw layers in the order of ``spec.channels``, NaN for no data. The
            result has shape (n, y, x), NaN where the initial DSM has no data.
        """
        residual: Tensor = self.net(x)
        return x[:, self.spec.layers.index("dsm")] + residual

    # --- fine-tuning ------------------------------------------------------------------------------

    def freeze_encoder(self) -> DeepDEM:
        """Return the model itself, its encoder as it is from now on, running statistics included.

        Raises
        ------
        ValueError
            The network has no part that is called ``encoder``.
        """
        self._encoder().requires_grad_(False)
        self._frozen = True
        return self.train(self.training)

    def unfreeze_encoder(self) -> DeepDEM:
        """Return the model itself, all of it trained from now on."""
        self._encoder().requires_grad_(True)
        self._frozen = False
        return self.train(self.training)

    def _encoder(self) -> nn.Module:
        encoder = getattr(self.net.network, "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise ValueError(
                f"architecture={self.spec.architecture!r} has no part 'encoder' to freeze: set "
                "requires_grad of its parameters yourself"
            )
        return encoder

    def train(self, mode: bool = True) -> DeepDEM:
        """Return the model itself, in training mode but for a frozen encoder."""
        super().train(mode)
        if self._frozen:
            self._encoder().eval()
        return self

    # --- before training --------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the DSM scale and the layers' statistics from the training scenes, once."""
        if stage != "fit":
            return
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            raise ValueError(
                f"precision={self.trainer.precision!r} would keep heights in 16 bits, steps of "
                "metres at 1000 m: pass '16-mixed' or 'bf16-mixed'"
            )
        data = getattr(self.trainer, "datamodule", None)
        width = getattr(data, "chip_size", self.spec.chip_size)
        if width != self.spec.chip_size:
            raise ValueError(
                f"the model has chip_size={self.spec.chip_size}, the data module {width}: heights "
                "are scaled by what a chip spans, so both must be the same"
            )
        if not getattr(data, "regions", {}).get("val", True):
            log.warning(
                "no validation chip: the validation part of split is narrower than a chip of %d px "
                "and the guard band of one; there will be no metrics of it, and nothing is "
                "calibrated", width,
            )  # fmt: skip
        self.train()  # a model that was loaded is in evaluation mode
        if self.spec.is_fitted:
            return
        if data is None or not hasattr(data, "statistics"):
            raise ValueError(
                "the model has no DSM scale and no data module to compute it from: train with "
                "trainer.fit(model, deepdem.ChipDataModule(...))"
            )
        self.fit_statistics(data.statistics())

    def fit_statistics(self, statistics: Statistics) -> None:
        """Take over the DSM scale (unless one was given) and the layers' means and spreads."""
        spec, keep = self.spec, self.spec.standardised
        given = not math.isnan(spec.dsm_scale)
        self.net.spec = replace(
            spec,
            dsm_scale=spec.dsm_scale if given else statistics.dsm_scale,
            pixel_size=statistics.pixel_size,
            means={n: statistics.means[n] for n in keep},
            stds={n: statistics.stds[n] for n in keep},
            training={**spec.training, "scenes": list(statistics.scenes)},
        )
        log.info("DSM scale %.3f m at %d px", self.net.spec.dsm_scale, spec.chip_size)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the moving average of the weights, if the recipe wants one."""
        if not self.recipe.ema:
            return []
        # When Lightning makes it, the model has not gone to its device yet: the average would be
        # kept on the CPU, and all weights fetched from a card after each step.
        device = self.trainer.strategy.root_device
        return [WeightAveraging(device, multi_avg_fn=averaged(self.recipe.ema))]

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimizer and schedule."""
        recipe = self.recipe
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[recipe.optimizer](
            [p for p in self.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        rates = torch.optim.lr_scheduler
        every_epoch: dict[str, Any] = {"interval": "epoch"}
        if recipe.schedule == "constant":
            return optimizer
        if recipe.schedule == "plateau":
            scheduler = rates.ReduceLROnPlateau(optimizer, factor=0.5, patience=50, threshold=0.1)
            often = self.trainer.check_val_every_n_epoch or 1
            settings = {**every_epoch, "monitor": "val_loss", "strict": False, "frequency": often}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}
        if recipe.schedule == "step":
            step = rates.StepLR(optimizer, step_size=200)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, **every_epoch}}
        share = {"cosine": warm_cosine, "flat": flat}[recipe.schedule]
        by_step = rates.LambdaLR(
            optimizer, lambda step: min(share(self._progress()), (step + 1) / WARM_STEPS)
        )
        settings = {"scheduler": by_step, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _progress(self) -> float:
        """Return how much of the training is done, by steps or by the clock, whichever is ahead."""
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches
        by_steps = trainer.global_step / steps if math.isfinite(steps) and steps > 0 else 0.0
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]  # untyped there
        by_clock = 0.0
        for timer in timers:
            left = timer.time_remaining()
            if left is not None and timer.start_time() is not None:
                gone = timer.time_elapsed()
                by_clock = max(by_clock, gone / max(gone + left, 1e-9))
        return min(max(by_steps, by_clock), 1.0)

    # --- steps ------------------------------------------------------------------------------------

    def _wanted(self, batch: Batch) -> Tensor:
        # Difference of heights first: residuals are small numbers, heights are not.
        return batch["target"] - batch["layers"][:, self.spec.layers.index("dsm")]

    def _error(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return error and scale in metres, and between them where DSM and truth are there.

        The error is 0 where they are not.
        """
        wanted = self._wanted(batch)
        usable = torch.isfinite(wanted)
        residual, scale = self.net.moments(batch["layers"])
        return torch.where(usable, residual - torch.nan_to_num(wanted), 0.0), usable, scale

    def _loss(
        self, error: Tensor, usable: Tensor, scale: Tensor | None, name: str | None = None
    ) -> Tensor:
        unit = self.spec.dsm_scale
        scaled = None if scale is None else scale / unit
        return LOSSES[name or self.recipe.loss](error / unit, usable, scaled)

    def on_train_epoch_start(self) -> None:
        """See which normalisations training moves."""
        self._norms = moving_norms(self.net)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the masked loss; a batch without a valid pixel gives zero, never NaN."""
        self._sample.add(batch["layers"])
        error, usable, scale = self._error(batch)
        loss = self._loss(error, usable, scale)
        metres = error.detach().abs().sum() / usable.sum().clamp(min=1)
        self.log("train_loss", loss, batch_size=len(usable))
        self.log("train_MAE", metres, prog_bar=True, batch_size=len(usable))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of the last epoch; in training, settle normalisations."""
        self._seen, self._example = ErrorStatistics(), None
        if self.trainer.state.fn == "fit":
            steps = self.trainer.global_step - self._settled_at
            self._settle(max(_FEWEST_BATCHES, int(_SETTLING_SHARE * steps)))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the errors in metres, and keep the first chip to be shown."""
        error, usable, scale = self._error(batch)
        # The weights of "beta_laplace" are the network's own: it could lower them by being sure.
        loss = "laplace" if scale is not None else self.recipe.loss
        self._seen.add(error, usable, float(self._loss(error, usable, scale, loss)))
        if batch_idx == 0:
            dsm = batch["layers"][0, self.spec.layers.index("dsm")]
            truth = batch["target"][0]
            known = torch.where(usable[0], truth + error[0], torch.nan)
            self._example = (dsm.cpu(), known.cpu(), truth.cpu())

    def on_validation_epoch_end(self) -> None:
        """Log MAE, RMSE, NMAD and bias of the validation region, metres, and show a chip."""
        seen = self._seen.everyones()
        metrics = seen.metrics()
        if not metrics:
            return
        # All processes have the same numbers: there is nothing left to bring together.
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name == "val_MAE", rank_zero_only=False)
        if self.trainer.sanity_checking:
            return
        validation = {n: v for n, v in metrics.items() if n != "val_loss"}
        self.net.spec = replace(
            self.spec, training={**self.spec.training, "validation": validation}
        )
        boards = [lg for lg in self.loggers if isinstance(lg, TensorBoardLogger)]
        if self._example is not None and boards and self.trainer.is_global_zero:
            dsm, refined, truth = (part.numpy() for part in self._example)
            row = picture(dsm, refined, truth, self.spec.pixel_size)
            for board in boards:
                board.experiment.add_image(
                    "validation chip: initial, refined, truth, error before, after",
                    row, self.global_step, dataformats="HWC",
                )  # fmt: skip

    def on_train_end(self) -> None:
        """Settle normalisations, calibrate predicted scales, and note what `refine` must know.

        By how much bfloat16 changes the heights, for one: `refine` goes by it, for it reads no
        pixel before it decides on a precision.
        """
        data = getattr(self.trainer, "datamodule", None)
        loader = data.val_dataloader() if data is not None else []
        mode = self.training
        self.eval()
        self._settle()
        changed = list(getattr(data, "augment", None) or ())
        self.net.spec = replace(self.spec, training={**self.spec.training, "augment": changed})
        with torch.inference_mode():
            if self.spec.uncertainty:
                self._calibrate(loader)
            batch = next(iter(loader), None) or next(
                iter(self.trainer.train_dataloader or []), None
            )
            noted: dict[str, Any] = {}
            if batch is not None:
                x = batch["layers"][:8].to(self.device)
                with exact():
                    full = self.net.moments(x)[0]
                rough = for_inference(self.net, bf16=True).moments(x)[0]
                noted["bf16_rms_m"] = float((rough - full).square().mean().sqrt())
        self.train(mode)
        self._sample, self._norms = ChipSample(), []  # their memory
        noted |= {"recipe": {**asdict(self.recipe), "augment": list(self.recipe.augment)},
                  "steps": self.trainer.global_step, "epochs": self.trainer.current_epoch,
                  "batch_size": getattr(data, "batch_size", None)}  # fmt: skip
        self.net.spec = replace(self.spec, training={**self.spec.training, **noted})

    def _settle(self, most: int | None = None) -> None:
        """Settle what training moves of the normalisations, by a sample of what it has seen."""
        settle(self._norms, self.net.moments, islice(self._sample.batches(), most))
        self._settled_at = self.trainer.global_step

    def _calibrate(self, loader: Any) -> None:
        """Fit the factor of predicted scales, and the intervals, to the validation chips."""
        chips = list(self._ratios(loader))
        if not chips:
            log.warning("no validation chip: the predicted scales are not calibrated")
            return
        found = fit_calibration(torch.cat(chips) * math.sqrt(2))
        noted: dict[str, Any] = {"temperature": found.temperature, "chips": len(chips)}
        for name, half in found.intervals.items():
            noted[f"laplace_{name}_holds"] = found.inside[name]
            # Between one place and another: what an average over all of them hides.
            held = torch.tensor([(c <= half * found.temperature).float().mean() for c in chips])
            noted[f"holds_{name}_in_chips"] = held.quantile(torch.tensor([0.1, 0.9])).tolist()
        self.net.spec = replace(
            self.spec,
            temperature=self.spec.temperature * found.temperature,
            intervals=found.intervals,
            training={**self.spec.training, "calibration": noted},
        )
        # A mean of symmetries has other errors and another spread; so many views are dear.
        every = -(-len(chips) * self.spec.chip_size**2 // _VIEWED_PX)
        viewed = list(self._ratios(loader, every, tta=True))
        self.net.spec = replace(self.spec, tta_intervals=half_widths(torch.cat(viewed)))

    def _ratios(self, loader: Any, every: int = 1, *, tta: bool = False) -> Iterator[Tensor]:
        """Yield of each chip, or every so-many-th, absolute errors over standard deviations."""
        how = Prediction(str(self.device), tta=True, swap=swapped_layers([self.spec]))
        number = 0
        for batch in loader:
            first = -number % every
            number += len(batch["target"])
            here: Batch = {name: part[first::every].to(self.device) for name, part in batch.items()}
            if not len(here["target"]):
                continue
            error, usable, scale = self._error(here)
            assert scale is not None
            std = scale * math.sqrt(2)
            if tta:
                residual, variance = predict([self.net], here["layers"], how)
                assert variance is not None
                std = variance.sqrt().to(self.device)
                error = residual.to(self.device) - self._wanted(here)
            for e, u, s in zip(error, usable, std, strict=True):
                ratio = (e[u].abs() / s[u]).float().cpu()
                if len(ratio):
                    yield ratio[:: -(-len(ratio) // _CHIP_SAMPLE)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the scale and the statistics with the weights."""
        checkpoint["deepdem_spec"] = asdict(self.spec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the scale and the statistics back."""
        if "deepdem_spec" in checkpoint:
            saved = checkpoint["deepdem_spec"]
            spec = ModelSpec(**{**saved, "layers": tuple(saved["layers"])})
            self.spec.check_alike(spec, "the checkpoint", "start without it")
            self.net.spec = spec

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model file: weights and all that `refine` needs, in one safetensors file.

        Raises
        ------
        ValueError
            The model was not trained and has no DSM scale.
        """
        write_model(self.net, path)


def _loss_of(loss: str | None, uncertainty: bool) -> str | None:
    """Return the loss that is meant: a predicted scale has its own, and it needs the scale."""
    if uncertainty and loss not in (None, *SCALE_LOSSES):
        raise ValueError(
            f"loss={loss!r} does not train a predicted scale: pass one of {list(SCALE_LOSSES)}, "
            "or uncertainty=False"
        )
    if loss in SCALE_LOSSES and not uncertainty:
        raise ValueError(f"loss={loss!r} needs a predicted scale: pass uncertainty=True")
    return loss or (SCALE_LOSSES[0] if uncertainty else None)


def load_model(
    path: str | PathLike[str], *, network: nn.Module | None = None, **training: Any
) -> DeepDEM:
    """Return the model of a model file, to refine with or to train on; nothing in it is executed.

    Trained on, it keeps its DSM scale and its layers' statistics.

    Parameters
    ----------
    path
        A path or a URL that fsspec knows.
    network
        The module of a model that was trained with one of your own: it is given the weights.
    training
        How it is to be trained on: ``preset``, ``learning_rate``, ``frozen_encoder`` and so on,
        as `DeepDEM` takes them.

    Raises
    ------
    ValueError
        The file is no model file, or a newer version's, or its weights do not fit.

    Examples
    --------
    >>> model = deepdem.load_model("baker.safetensors", learning_rate=1e-4).freeze_encoder()
    >>> pytorch_lightning.Trainer(max_epochs=5).fit(model, data)
    """
    net = read_model(path, network=network)
    model = model_of(net, **training)
    model.net.spec = replace(
        net.spec, training={**net.spec.training, "started_from": Path(path).name}
    )
    return model


def model_of(net: ResidualNet, **training: Any) -> DeepDEM:
    """Return a DeepDEM, in evaluation mode, with the weights and the description of `net`."""
    spec = net.spec
    own = net.network if spec.architecture == OWN else None
    model = DeepDEM(
        spec.layers, spec.target, architecture=spec.architecture, encoder=spec.encoder,
        network=own, chip_size=spec.chip_size, centering=spec.centering,
        dsm_scale=spec.dsm_scale, uncertainty=spec.uncertainty, options=spec.options, **training,
    )  # fmt: skip
    model.net.spec = spec
    model.net.load_state_dict(net.state_dict())
    if own is not None:
        own.requires_grad_(True)
    return model.eval()
