"""The model file: safetensors with a description in its metadata, checked before it is believed.

It may come from a stranger. Nothing in it is executed, no name in it is imported, and a network is
built of it only once its tensors are seen to be those that the description asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from deepdem.layers import describe
from deepdem.models import OWN, ModelSpec, ResidualNet, build_network

__all__ = ["model_card", "read_model", "serialise", "weights_hash", "write_model"]

_FORMAT = 1
_KEY = "deepdem"
# The largest number in an architecture's options (a width), and how many stand in one list.
_MOST_OPTION, _MOST_OPTIONS = 8192, 64


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
    """Write the model file; it appears whole or not at all.

    Raises
    ------
    ValueError
        The model was not trained, or its training diverged.
    """
    target = Path(path)
    if not net.spec.is_fitted:
        raise ValueError(
            "the model has no DSM scale yet: train it, or pass dsm_scale= and fit it to scenes"
        )
    if broken := _not_finite(net.state_dict()):
        raise ValueError(
            f"the weights {broken} are not finite: training diverged, lower learning_rate"
        )
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(serialise(net))
    part.replace(target)


def read_model(
    source: str | PathLike[str] | bytes, *, network: nn.Module | None = None
) -> ResidualNet:
    """Return the network of a model file, in evaluation mode; nothing in the file is executed.

    Parameters
    ----------
    source
        A path, a URL that fsspec knows, or the file's bytes.
    network
        The user's own module, for the file of a model that was trained with one: it is given the
        weights. The file names no code.

    Raises
    ------
    ValueError
        The file is no model file, or a newer version's, or was cut off; it describes something
        that is no model; its weights do not fit its description, or are not finite; it needs
        `network`, or has no use for it.
    FileNotFoundError
        There is no such file.
    """
    what = "the model file" if isinstance(source, bytes) else fspath(source)
    content = source if isinstance(source, bytes) else _read_bytes(what)
    spec = _spec_of(content, what)
    try:
        state = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{what} is damaged, or was cut off: {error}") from error
    if (spec.architecture == OWN) != (network is not None):
        raise ValueError(
            f"{what} holds a network of the user's own, {spec.encoder!r}: build it and pass it, "
            "load_model(path, network=module)"
            if network is None
            else f"{what} holds an {spec.architecture!r} that is built here: leave network= out"
        )
    net = _built(spec, network, state, what)
    if broken := _not_finite(state):
        raise ValueError(f"the weights {broken} in {what} are not finite: its training diverged")
    return net.eval().requires_grad_(False)


def _built(
    spec: ModelSpec, network: nn.Module | None, state: Mapping[str, Tensor], what: str
) -> ResidualNet:
    """Return a network with the file's tensors, or say where it is not of their shape."""
    if network is not None:
        net = ResidualNet(spec, network)
        _compare(net, state, what)
        net.load_state_dict(state)
        return net
    try:
        # First without memory: a description may ask for more than there is. And most of the time
        # that a network takes to be made is drawing weights that are then replaced.
        with torch.device("meta"):
            sketch: ResidualNet | None = ResidualNet(spec, build_network(spec))
    except (RuntimeError, ValueError) as error:
        # Some encoders compute with numbers when they are built, which needs memory.
        if "meta" not in str(error):
            raise ValueError(f"{what} describes no network that can be: {error}") from error
        sketch = None
    if sketch is not None:
        _compare(sketch, state, what)
        if all(state[name].dtype == t.dtype for name, t in sketch.state_dict().items()):
            sketch.load_state_dict(state, assign=True)
            # Some keep numbers that are in no file, and so are not there yet.
            held = (*sketch.buffers(), *(v for m in sketch.modules() for v in vars(m).values()))
            if not any(isinstance(value, Tensor) and value.is_meta for value in held):
                return sketch
    net = ResidualNet(spec)
    _compare(net, state, what)
    net.load_state_dict(state)
    return net


def _compare(net: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    said = []
    if lacking := sorted(set(wanted) - set(given)):
        said.append(f"{len(lacking)} tensors are missing ({', '.join(lacking[:3])})")
    if strange := sorted(set(given) - set(wanted)):
        said.append(f"{len(strange)} are not known ({', '.join(strange[:3])})")
    said += [
        f"{name} has the shape {given[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ][:3]
    if said:
        raise ValueError(
            f"the weights in {what} are not those of its network: {'; '.join(said)}. It was "
            "changed, or is not the network that was trained: save the model again"
        )


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    floats = {n: t for n, t in state.items() if t.is_floating_point()}
    # A sum is not finite if one of its terms is not, and is had at once. It may also be too large.
    doubtful = [n for n, t in floats.items() if not bool(torch.isfinite(t.sum()))]
    return [n for n in doubtful if not bool(torch.isfinite(floats[n]).all())][:3]


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
        number, values = described["format"], described["spec"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{what} is no deepdem model file (safetensors with a {_KEY!r} entry in its metadata)"
        ) from error
    if not isinstance(number, int) or not isinstance(values, dict):
        raise ValueError(f"{what} is no deepdem model file: its description is none")
    if number > _FORMAT:
        raise ValueError(
            f"{what} has format {number}, this version of deepdem reads up to {_FORMAT}: upgrade "
            "deepdem"
        )
    if strange := set(values) - set(ModelSpec.__dataclass_fields__):
        raise ValueError(
            f"{what} describes the model by {sorted(strange)}, which is not known here: if a newer "
            "deepdem wrote it, upgrade deepdem"
        )
    try:
        _check_types(values)
        values = {**values, "layers": tuple(values["layers"])}
        values["training"] = {
            **values.get("training", {}), "versions": described.get("versions", {})
        }  # fmt: skip
        spec = ModelSpec(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{what} describes no model that can be: {error}") from error
    if not spec.is_fitted:
        lacking = [n for n in spec.standardised if n not in spec.stds or n not in spec.means]
        raise ValueError(
            f"{what} has no {'mean and spread of ' + str(lacking) if lacking else 'DSM scale'}: "
            "heights from it would mean nothing"
        )
    return spec


def _check_types(values: Mapping[str, Any]) -> None:
    """Refuse what the description's entries cannot be, before anything is made of them."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(n, str) for n in value)

    def numbers(value: Any) -> bool:
        return isinstance(value, dict) and all(number(v) for v in value.values())

    kinds: dict[str, type | Callable[[Any], bool]] = {
        "layers": names, "target": str, "architecture": str, "encoder": str, "chip_size": int,
        "dsm_scale": number, "pixel_size": number, "temperature": number, "means": numbers,
        "stds": numbers, "intervals": numbers, "tta_intervals": numbers,
        "uncertainty": bool, "options": dict, "training": dict,
        "clip": lambda v: v is None or number(v), "centering": str,
        "reach_px": lambda v: v is None or number(v),
    }  # fmt: skip
    for name, value in values.items():
        kind = kinds.get(name, object)
        fits = isinstance(value, kind) if isinstance(kind, type) else kind(value)
        if not fits or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name}={str(value)[:60]!r} is of the wrong kind")
    for name, value in values.get("options", {}).items():
        inside = value if isinstance(value, list) else [value]
        plain = all(v is None or isinstance(v, str | bool | int | float) for v in inside)
        large = any(number(v) and not abs(v) <= _MOST_OPTION for v in inside)
        if not plain or large or len(inside) > _MOST_OPTIONS:
            raise ValueError(
                f"options[{name!r}]={str(value)[:60]}: wanted numbers up to {_MOST_OPTION}, words, "
                f"or up to {_MOST_OPTIONS} of them"
            )


def model_card(net: ResidualNet) -> dict[str, dict[str, str]]:
    """Return what a reader wants to know of a model: sections of names and values, in words."""
    spec, told = net.spec, net.spec.training
    width = spec.chip_size * spec.pixel_size
    inputs = {}
    for name in spec.layers:
        layer = describe(name)
        known = f", {spec.means[name]:.4g} ± {spec.stds[name]:.3g}" if name in spec.stds else ""
        inputs[name] = f"{layer.long_name} [{layer.units}]{known}"
    ground = "" if not math.isfinite(width) else f", {width:.3g} m of ground"
    model = {
        "gives": f"{describe(spec.target).long_name} ({spec.target}), metres"
        + (", and a standard deviation" if spec.uncertainty else ""),
        "network": spec.architecture
        + (f", {spec.encoder}" if spec.architecture != "resdepth" else "")
        + _pairs(spec.options, "; "),
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "chips": f"{spec.chip_size} px{ground}",
        "heights": "above the local level" if spec.centering == "local" else "above a chip's mean",
        "windows": f"as wide as a chip, or wider by multiples of {spec.window_step} px"
        if spec.window_step
        else "as wide as a chip",
        "pixel size": f"{spec.pixel_size:.4g} m",
        "DSM scale": f"{spec.dsm_scale:.3f} m",
        "hash": weights_hash(net),
    }
    return {"model": model, "sees": inputs, "training": _training(told),
            "validation": _errors(spec)}  # fmt: skip


def _training(told: Mapping[str, Any]) -> dict[str, str]:
    recipe = {k: v for k, v in told.get("recipe", {}).items() if k != "augment"}
    lines = {
        "scenes": ", ".join(map(str, told.get("scenes", []))),
        "imported from": str(told.get("imported", "")),
        "started from": str(told.get("started_from", "")),
        "length": ", ".join(
            f"{told[k]} {k.replace('_', ' ')}" for k in ("epochs", "steps") if told.get(k)
        ),
        "batch size": str(told.get("batch_size") or ""),
        "recipe": _pairs(recipe, ""),
        "chips changed by": ", ".join(told.get("augment", [])) or ("nothing" if recipe else ""),
        "versions": _pairs(told.get("versions", {}), ""),
    }
    return {name: line for name, line in lines.items() if line}


def _errors(spec: ModelSpec) -> dict[str, str]:
    told = spec.training
    lines = {
        name.removeprefix("val_"): f"{value:+.3f} m" if "bias" in name else f"{value:.3f} m"
        for name, value in told.get("validation", {}).items()
    }
    if "bf16_rms_m" in told:
        lines["bfloat16 changes"] = f"{told['bf16_rms_m']:.4f} m rms"
    if "calibration" in told:
        for name, half in spec.intervals.items():
            lines[f"{name} % interval"] = f"± {half:.3f} refined_std"
            if name in spec.tta_intervals:
                lines[f"{name} % interval"] += f", with tta {spec.tta_intervals[name]:.3f}"
            if between := told["calibration"].get(f"holds_{name}_in_chips"):
                low, high = between
                lines[f"{name} % interval"] += f"; in 8 of 10 chips {low:.0%} to {high:.0%}"
        chips = told["calibration"].get("chips", "the")
        lines["calibration"] = f"scales times {spec.temperature:.3f}; {chips} validation chips"
    return lines or {"errors": "none noted"}


def _pairs(values: Mapping[str, Any], lead: str) -> str:
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return lead + text if text else ""
