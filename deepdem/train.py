"""Training: a LightningModule as Lightning users know it, its losses and its schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from torch import Tensor

from deepdem.data import Batch, Statistics
from deepdem.models import (
    ModelSpec,
    ResidualNet,
    build_network,
    for_inference,
    read_model,
    write_model,
)

__all__ = ["LOSSES", "DeepDEM", "load_model", "model_of"]

log = logging.getLogger(__name__)


def _l1(error: Tensor) -> Tensor:
    return error.abs()


def _huber(error: Tensor) -> Tensor:
    # Quadratic within 0.05 of the DSM scale: half a metre where a chip spans ten.
    return torch.nn.functional.huber_loss(
        error, torch.zeros_like(error), reduction="none", delta=0.05
    )


#: Losses of the error in units of the DSM scale, pixel by pixel.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "huber": _huber}


class DeepDEM(pl.LightningModule):
    """A network that repairs an initial DSM, to be trained with Lightning.

    Parameters
    ----------
    layers
        The input layers by name, ``dsm`` among them.
    target
        The truth it learns: ``lidar_dsm`` or ``lidar_dtm``.
    architecture, encoder
        Names as segmentation-models-pytorch has them, in lower case.
    encoder_weights
        ``"imagenet"`` loads pretrained weights from a hub; None starts from scratch.
    chip_size
        The width of chips and inference windows, a multiple of 32.
    dsm_scale
        Metres; None: computed from the training scenes when training starts.
    uncertainty
        Whether the network also predicts the scale b of a Laplace distribution of its error. It
        is then trained on that distribution's negative log-likelihood, |e| / b + log 2b (Kendall
        and Gal, 2017, equation 8, for the L1 norm), and `loss` is not used.
    loss
        A name from `LOSSES`; pixels without DSM or truth do not count.
    learning_rate, weight_decay
        Of AdamW; the rate warms up over the first 5 % of training and falls to zero as a cosine.
        Training is as long as the Trainer's ``max_epochs``, ``max_steps`` or ``max_time`` says.
    options
        Further keywords of the architecture, such as ``decoder_channels``.

    Raises
    ------
    ValueError
        Layers without ``dsm`` or with a truth, an unknown target, encoder or loss, or a chip size
        that is no multiple of 32.

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
        architecture: str = "unet",
        encoder: str = "resnet18",
        encoder_weights: str | None = None,
        chip_size: int = 256,
        dsm_scale: float | None = None,
        uncertainty: bool = False,
        loss: str = "l1",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not known: pass one of {sorted(LOSSES)}")
        self.save_hyperparameters(
            {
                "layers": list(layers), "target": target, "architecture": architecture,
                "encoder": encoder, "encoder_weights": None, "chip_size": chip_size,
                "dsm_scale": dsm_scale, "uncertainty": uncertainty, "loss": loss,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay, "options": dict(options or {}),
            }
        )  # fmt: skip
        spec = ModelSpec(
            tuple(layers), target, architecture, encoder, chip_size,
            math.nan if dsm_scale is None else float(dsm_scale), uncertainty=uncertainty,
            options=dict(options or {}),
        )  # fmt: skip
        self.net = ResidualNet(spec, build_network(spec, encoder_weights))
        # Convolutions on the CPU and on tensor cores are faster in this layout.
        self.net.to(memory_format=torch.channels_last)
        self._errors: list[Tensor] = []

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
            (n, layer, y, x) raw layers in the order of ``layers``, NaN for no data. The result has
            shape (n, y, x), NaN where the initial DSM has no data.
        """
        residual: Tensor = self.net(x)
        return x[:, self.spec.layers.index("dsm")] + residual

    def setup(self, stage: str) -> None:
        """Take the DSM scale and the layers' statistics from the training scenes, once."""
        if stage != "fit" or self.spec.is_fitted:
            return
        data = getattr(self.trainer, "datamodule", None)
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

    def _error(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return error and scale in metres, and between them where DSM and truth are there.

        The error is 0 where they are not.
        """
        x, target = batch["layers"], batch["target"]
        dsm = x[:, self.spec.layers.index("dsm")]
        # Difference of heights first: residuals are small numbers, heights are not.
        wanted = target - dsm
        usable = torch.isfinite(wanted)
        residual, scale = self.net.moments(x)
        return torch.where(usable, residual - torch.nan_to_num(wanted), 0.0), usable, scale

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the masked loss; a batch without a valid pixel gives zero, never NaN."""
        error, usable, scale = self._error(batch)
        count = usable.sum().clamp(min=1)
        unit = self.spec.dsm_scale
        if scale is None:
            pixels = LOSSES[self.hparams["loss"]](error / unit)
        else:
            pixels = torch.where(usable, error.abs() / scale + torch.log(2 * scale / unit), 0.0)
        loss = pixels.sum() / count
        metres = error.detach().abs().sum() / count
        self.log("train_loss", loss)
        self.log("train_MAE", metres, prog_bar=True, batch_size=len(usable))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of the last epoch."""
        self._errors = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the errors in metres."""
        error, usable, _ = self._error(batch)
        self._errors.append(error[usable].float().cpu())

    def on_validation_epoch_end(self) -> None:
        """Log MAE, RMSE, NMAD and bias of the validation region, metres."""
        errors = torch.cat(self._errors) if self._errors else torch.empty(0)
        self._errors = []
        if not len(errors):
            return
        median = errors.median()
        metrics = {
            "val_MAE": errors.abs().mean(),
            "val_RMSE": errors.square().mean().sqrt(),
            "val_NMAD": 1.4826 * (errors - median).abs().median(),
            "val_bias": errors.mean(),
        }
        self.log_dict(metrics, prog_bar=False)
        self.log("val_loss", metrics["val_MAE"] / self.spec.dsm_scale)
        if not self.trainer.sanity_checking:
            validation = {name: float(value) for name, value in metrics.items()}
            training = {**self.spec.training, "validation": validation}
            self.net.spec = replace(self.spec, training=training)

    def on_train_end(self) -> None:
        """Note by how much bfloat16 changes the heights, and how chips were changed.

        `refine` goes by it: it reads no pixel before it decides on a precision.
        """
        data = getattr(self.trainer, "datamodule", None)
        loader = data.val_dataloader() if data is not None else []
        batch = next(iter(loader), None) or next(iter(self.trainer.train_dataloader or []), None)
        if batch is None:
            return
        x = batch["layers"][:8].to(self.device)
        training = self.training
        self.eval()
        with torch.inference_mode():
            exact, _ = self.net.moments(x)
            rough, _ = for_inference(self.net, bf16=True).moments(x)
        self.train(training)
        rms = float((rough - exact).square().mean().sqrt())
        augment = list(getattr(data, "augment", ()))
        noted = {**self.spec.training, "bf16_rms_m": rms, "augment": augment}
        self.net.spec = replace(self.spec, training=noted)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up and a cosine to zero."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: _warm_cosine(self._progress())
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the scale and the statistics with the weights."""
        checkpoint["deepdem_spec"] = asdict(self.spec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the scale and the statistics back."""
        if "deepdem_spec" in checkpoint:
            saved = checkpoint["deepdem_spec"]
            self.net.spec = ModelSpec(**{**saved, "layers": tuple(saved["layers"])})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model file: weights and all that `refine` needs, in one safetensors file.

        Raises
        ------
        ValueError
            The model was not trained and has no DSM scale.
        """
        write_model(self.net, path)


def _warm_cosine(progress: float, warm: float = 0.05) -> float:
    if progress < warm:
        return max(progress / warm, 0.02)
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def load_model(path: str | PathLike[str]) -> DeepDEM:
    """Return the model of a model file; nothing in the file is executed.

    Parameters
    ----------
    path
        A path or a URL that fsspec knows.

    Raises
    ------
    ValueError
        The file is no model file, or a newer version's, or its weights do not fit.
    """
    return model_of(read_model(path))


def model_of(net: ResidualNet) -> DeepDEM:
    """Return a DeepDEM, in evaluation mode, with the weights and the description of `net`."""
    spec = net.spec
    model = DeepDEM(
        spec.layers, spec.target, architecture=spec.architecture, encoder=spec.encoder,
        chip_size=spec.chip_size, dsm_scale=spec.dsm_scale, uncertainty=spec.uncertainty,
        options=spec.options,
    )  # fmt: skip
    model.net.spec = spec
    model.net.load_state_dict(net.state_dict())
    return model.eval()
