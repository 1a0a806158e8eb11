"""The predecessors' checkpoints as models of ours, without executing what is pickled in them.

Both are PyTorch files, that is pickles. They are read by unpicklers that know plain containers,
numbers, tensors and paths; anything else is refused by its name.
"""

from __future__ import annotations

import json
import math
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdem.models import ModelSpec, ResidualNet, build_network
from deepdem.train import DeepDEM, model_of

__all__ = ["import_checkpoint"]

# The predecessor's names; its nodata_mask is 1 where there is data.
_BANDS = {
    "asp_dsm": "dsm",
    "ortho_channel1": "ortho_left",
    "ortho_channel2": "ortho_right",
    "nodata_mask": "valid",
}
# Its defaults of the DSM scale by chip size, metres.
_SCALES = {64: 9.86, 128: 18.59, 256: 34.90, 512: 63.51, 1024: 112.11}


def import_checkpoint(
    path: str | PathLike[str],
    *,
    kind: str = "deepdem",
    target: str = "lidar_dsm",
    chip_size: int = 256,
) -> DeepDEM:
    """Return a model that refines with the numbers of a predecessor's own forward pass.

    Parameters
    ----------
    path
        ``kind="deepdem"``: a Lightning checkpoint of the published DeepDEM task.
        ``kind="resdepth"``: ResDepth's ``Model_best.pth``, or the folder it lies in, with
        ``model_config.json``, ``DSM_normalization_parameters.p`` and
        ``Image_normalization_parameters.p`` beside it.
    kind
        ``"deepdem"`` or ``"resdepth"``.
    target
        What it was trained for; the files do not say.
    chip_size
        The width of ResDepth's windows; a DeepDEM checkpoint says its own.

    Returns
    -------
    DeepDEM
        In evaluation mode; its pixel size is not known. Its images are not to be equalised by
        `prepare`, but as they were when it was trained.

    Raises
    ------
    ValueError
        The file holds something other than plain containers, numbers, tensors and paths, or its
        weights do not fit its description.
    NotImplementedError
        The network is of a form that has no equal here; the message says which.
    FileNotFoundError
        A file is missing.

    Examples
    --------
    >>> model = deepdem.import_checkpoint("last.ckpt", kind="deepdem")
    >>> model.save("model.safetensors")
    """
    readers = {"deepdem": _deepdem, "resdepth": _resdepth}
    if kind not in readers:
        raise ValueError(f"kind={kind!r}: pass 'deepdem' or 'resdepth'")
    old = readers[kind](Path(path), chip_size)
    return model_of(_net(old, target, kind))


@dataclass(frozen=True)
class _Old:
    """What a checkpoint says, in our words."""

    what: Path
    layers: tuple[str, ...]
    architecture: str
    encoder: str
    chip_size: int
    dsm_scale: float
    image_mean: float
    image_std: float
    state: dict[str, Tensor]


def _net(old: _Old, target: str, kind: str) -> ResidualNet:
    spec = ModelSpec(
        old.layers, target, old.architecture, old.encoder, old.chip_size, old.dsm_scale,
        clip=None, options=_resdepth_options(old.state) if old.architecture == "resdepth" else {},
        training={"imported": f"{kind}: {old.what.name}"},
    )  # fmt: skip
    images = {n for n in spec.standardised if n.startswith("ortho_")}
    means = {n: old.image_mean if n in images else 0.0 for n in spec.standardised}
    stds = {n: old.image_std if n in images else 1.0 for n in spec.standardised}
    spec = ModelSpec(**{**vars(spec), "means": means, "stds": stds})
    network = build_network(spec)
    try:
        network.load_state_dict(old.state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {old.what} do not fit the {old.architecture!r} with the layers "
            f"{list(old.layers)} that it describes: {error}"
        ) from error
    return ResidualNet(spec, network).eval()


def _resdepth_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the form of a ResDepth network as its weights show it."""
    depth = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
    start = len(state["encoder.0.0.0.weight"])
    widest = max(len(v) for n, v in state.items() if n.endswith("0.weight") and v.ndim == 4)
    return {
        "start_kernel": start,
        "max_filter_depth": widest,
        "depth": depth,
        "do_bn": any(name.endswith("running_mean") for name in state),
        "bias_conv_layer": "bottleneck.0.bias" in state,
    }


def _deepdem(path: Path, chip_size: int) -> _Old:
    checkpoint = _tensors(path)
    settings = checkpoint["hyper_parameters"]
    bands = list(settings["bands"])[:-1]  # the last one is the lidar, the label
    layers = tuple(_BANDS.get(band, band) for band in bands)
    if "dsm" not in layers:
        raise NotImplementedError(
            f"{path} has no band 'asp_dsm': it predicts heights from images alone, and there is "
            "no initial DSM to repair"
        )
    names = {"smp-unet": "unet", "unet": "resdepth"}
    if settings["model"] not in names:
        raise NotImplementedError(f"{path} has model={settings['model']!r}, known: {list(names)}")
    size = int(settings["chip_size"])
    scales = settings.get("GSF_DICT") or _SCALES
    if size not in scales:
        raise ValueError(f"{path} has chips of {size} px, and scales only for {sorted(scales)}")
    state = {
        name.removeprefix("model."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    return _Old(
        path, layers, names[settings["model"]], str(settings.get("encoder") or "resnet18"), size,
        float(scales[size]), 0.0, 1.0, state,
    )  # fmt: skip


def _resdepth(path: Path, chip_size: int) -> _Old:
    file = path / "Model_best.pth" if path.is_dir() else path
    folder = file.parent
    config = json.loads((folder / "model_config.json").read_text())
    settings = config["settings"]
    known: dict[str, Any] = {
        "act_fn_encoder": "relu", "act_fn_decoder": "relu", "act_fn_bottleneck": "relu",
        "up_mode": "transpose", "outer_skip": True, "outer_skip_BN": False,
    }  # fmt: skip
    for name, value in known.items():
        if settings.get(name, value) != value:
            raise NotImplementedError(
                f"{folder} has {name}={settings[name]!r}; only {value!r} has its equal here"
            )
    heights, images = (
        _plain(folder / f"{what}_normalization_parameters.p") for what in ("DSM", "Image")
    )
    if heights["mean"] is not None:
        raise NotImplementedError(
            f"{folder} subtracts {heights['mean']} m from all heights; here a window is centred "
            "on its own mean"
        )
    views = int(settings["n_input_channels"]) - 1
    orthos = {1: ["ortho_left"], 2: ["ortho_left", "ortho_right"]}
    layers = ("dsm", *orthos.get(views, [f"ortho_{n + 1}" for n in range(views)]))
    mean, std = (math.nan if images[k] is None else float(images[k]) for k in ("mean", "std"))
    if views and not (math.isfinite(mean) and std > 0):
        raise NotImplementedError(f"{folder} has no one mean and spread for its images: {images}")
    return _Old(
        file, layers, "resdepth", "none", chip_size, float(heights["std"]), mean, std,
        _tensors(file)["model_state_dict"],
    )  # fmt: skip


def _tensors(path: Path) -> dict[str, Any]:
    """Return a PyTorch file's content by its restricted unpickler; paths come as pure paths."""
    pure = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    allowed: list[Any] = [(kind, f"pathlib.{name}") for name, kind in pure.items()]
    allowed += [pathlib.PurePosixPath, pathlib.PureWindowsPath]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than containers, numbers, tensors and paths, and is not read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    assert isinstance(content, dict)
    return content


class _Plain(pickle.Unpickler):
    """Unpickles containers and numbers, NumPy's among them, and nothing else."""

    _ALLOWED = frozenset(
        {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"),
         ("numpy._core.multiarray", "scalar")}
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise ValueError(
                f"a file of numbers asks for {module}.{name}, which is not read from strangers"
            )
        return np.dtype if name == "dtype" else super().find_class(module, name)


def _plain(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = _Plain(file).load()
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dict of mean and std")
    return content
