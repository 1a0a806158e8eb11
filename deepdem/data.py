"""What feeds a network: chips of many scenes as torch batches, in a Lightning data module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytorch_lightning as pl
import torch
import xarray as xr
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from odc.geo.geobox import GeoBox
from torch import Tensor
from torch.utils.data import DataLoader

from deepdem.batches import (
    LANES,
    Batch,
    FixedBatches,
    TrainBatches,
    TrainLoader,
    fixed_loader,
    train_loader,
)  # fmt: skip
from deepdem.level import LevelRegion, local_level
from deepdem.models import ModelSpec
from deepdem.recipes import Recipe
from deepdem.regions import Plane, Region, SceneReader, shared_room
from deepdem.sampling import WEIGHTS, Places, Plan, Weight, fixed_chips, tiling
from deepdem.scene import check_scene, pixel_size
from deepdem.splits import Split, Use, split_of
from deepdem.statistics import robust_mean

__all__ = ["AUGMENTATIONS", "Batch", "ChipDataModule", "Statistics", "augmented"]

#: What may be done to a batch in training.
AUGMENTATIONS = ("flip", "rotate", "swap", "noise", "voids")
#: Of a scene that is larger than memory the statistics are taken from so many tiles.
_SAMPLED_TILES = 64
#: Tiles that are open at once of what is held in memory: they cost nothing there.
_OPEN_HELD = 64


@dataclass(frozen=True)
class Statistics:
    """What a network must know of its training scenes.

    Attributes
    ----------
    dsm_scale
        Metres; see `dsm_scale`.
    pixel_size
        Metres; the mean over the scenes.
    means, stds
        Of each layer over the valid pixels of the training regions.
    scenes
        The scenes' names.
    """

    dsm_scale: float
    pixel_size: float
    means: Mapping[str, float]
    stds: Mapping[str, float]
    scenes: tuple[str, ...]


class ChipDataModule(pl.LightningDataModule):
    """Training, validation and test chips of one scene or many, as Lightning wants them.

    Parameters
    ----------
    scenes
        Scenes (Datasets), or one of them, or a DataTree of them.
    chip_size
        The chip's width in pixels.
    batch_size
        Chips in a batch.
    split
        What is trained on and what is for validation and the test: ``"left 80 %"`` of each scene
        (see `deepdem.splits.split_scene`), `deepdem.Stripes`, `deepdem.ByScene` or
        `deepdem.Polygons`. A band of one chip between the parts belongs to none.
    min_valid
        Chips with a smaller share of pixels that have both the DSM and the truth are left out.
        It is counted where chips are read anyway, nothing is read for it beforehand. The counts are
        kept, in cells of about an eighth of a chip, so that tiles without a chip are not read again
        in later epochs: 39 MB once all of a scene of 100 000 by 100 000 pixels has been read.
    chips_per_epoch
        How many training chips make an epoch; by default as many as there are places half a chip
        apart. In regions that are not held in memory they count whether valid or not.
    val_chips
        How many validation and test chips there are at most: tiles are drawn, the same ones for
        the same seed. None: all of them.
    balance
        ``"area"``: each place comes as often as any other, so scenes count by their valid area;
        ``"scene"``: as many chips from each scene.
    weights
        What places come in proportion to: ``"terrain"`` (how steep the true surface is),
        ``"error"`` (the mean absolute error of the initial one), or a function that takes the
        chip's DSM and truth, arrays (y, x) in metres with NaN, and gives a number. None: all
        the same.
    augment
        Of ``"flip"``, ``"rotate"`` (quarter turns), ``"swap"`` (left and right image change
        places), ``"noise"`` (the DSM gets smooth and rough noise, up to a quarter of the mean
        absolute error that the chip has) and ``"voids"`` (rectangles without DSM). Training
        only; validation chips are never changed. None: what the model's preset says. That of the
        default preset is nothing, for the first three turn the sun and the parallax between the
        images, from which a network learns which way a wrong height displaced them. On one
        synthetic scene, 90 s of training each, flips and turns took the gain in MAE from 56 % to
        34 %. With many scenes of many geometries they may help.
    seed
        The same seed gives the same chips, however many workers there are. Whether regions are
        held, and how wide tiles are, goes by `cache`: give a number where runs on machines of
        different memory must see the same chips.
    cache
        What may be held in memory: a number of bytes, or a text such as ``"4 GiB"``; ``"auto"`` is
        a quarter of what is free. Regions that fit are read once and held. Otherwise chips are
        read tile by tile in each epoch, and tiles take as much. True holds them in any case, False
        never.
    num_workers
        Processes that read and cut chips; each opens the stores by itself. ``"auto"``: none where
        the regions are in memory or go through Dask, else two. A script that uses them needs
        ``if __name__ == "__main__":`` round what it does. 1, 2 or 4 share out the tiles; with
        other numbers some are read twice.

    Notes
    -----
    It asks the model that is trained for its layers and its target. Batches are dicts: ``layers``
    (n, channel, y, x) and ``target`` (n, y, x), float32, raw units, NaN for no data. A scene that
    was opened and not changed is read straight from its store; one that is computed goes through
    Dask. A checkpoint taken within an epoch is resumed at its next batch.

    Raises
    ------
    ValueError
        An option is not understood, or no scene is given.

    Examples
    --------
    >>> data = deepdem.ChipDataModule([ds], chip_size=128, batch_size=16)
    >>> pytorch_lightning.Trainer(max_epochs=10).fit(model, data)
    """

    def __init__(
        self,
        scenes: xr.Dataset | xr.DataTree | Sequence[xr.Dataset],
        *,
        chip_size: int = 256,
        batch_size: int = 24,
        split: str | Split = "left 80 %",
        min_valid: float = 0.5,
        chips_per_epoch: int | None = None,
        val_chips: int | None = 1024,
        balance: str = "area",
        weights: str | Weight | None = None,
        augment: Sequence[str] | None = None,
        seed: int = 0,
        cache: str | int | bool = "auto",
        num_workers: str | int = "auto",
    ):
        super().__init__()
        names, self.scenes = _named(scenes)
        self.names = tuple(names)
        self.chip_size, self.batch_size, self.split = chip_size, batch_size, split_of(split)
        self.min_valid, self.chips_per_epoch, self.seed = min_valid, chips_per_epoch, seed
        self.val_chips = val_chips
        if unknown := set(augment or ()) - set(AUGMENTATIONS):
            raise ValueError(f"augment={sorted(unknown)}: wanted of {', '.join(AUGMENTATIONS)}")
        if balance not in ("area", "scene"):
            raise ValueError(f"balance={balance!r}: wanted 'area' or 'scene'")
        if isinstance(weights, str) and weights not in WEIGHTS:
            raise ValueError(
                f"weights={weights!r} is not known: pass one of {sorted(WEIGHTS)}, or a function "
                "of DSM and truth"
            )
        if isinstance(num_workers, str) and num_workers != "auto":
            raise ValueError(f"num_workers={num_workers!r}: wanted a number, or 'auto'")
        self.balance, self.cache = balance, cache
        self.augment = None if augment is None else tuple(augment)
        self.weights = WEIGHTS[weights] if isinstance(weights, str) else weights
        self.num_workers = num_workers
        self._limit()  # what is not understood is told now
        self.layers: tuple[str, ...] = ()
        self.channels: tuple[str, ...] = ()
        self.target = ""
        self.regions: dict[Use, list[Region]] = {}
        self._plan: Plan | None = None
        self._fixed: dict[Use, FixedBatches] = {}
        self._loader: TrainLoader | None = None
        self._resumed: dict[str, int] = {}

    # --- what there is -------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Cut the scenes into regions; reads those that are held in memory, and else nothing."""
        spec = self._spec()
        if self.augment is None:
            assert self.trainer is not None
            recipe = getattr(self.trainer.lightning_module, "recipe", Recipe())
            self.augment = recipe.augment
        wanted = spec.channels, spec.target
        if self.regions and wanted == (self.channels, self.target):
            return
        self.channels, self.target = wanted
        self.layers, self._fixed, self._plan = spec.layers, {}, None
        self.regions = self._cut(spec)
        every = [region for regions in self.regions.values() for region in regions]
        plan = Plan(
            self.chip_size, self.min_valid, self.seed, self.balance == "scene", self.weights
        )
        if self._holds(every):
            for region in every:
                region.hold(shared=self._workers(every) > 0)
            self._plan = replace(plan, open_tiles=_OPEN_HELD)
            if not self._places():
                raise ValueError(
                    f"no training chip: no place of {self.chip_size} px in the training region "
                    f"({self.split}) has {self.min_valid:.0%} of its pixels with both 'dsm' and "
                    f"{self.target!r}: pass a smaller chip_size or min_valid, or another split"
                )
        else:
            self._plan = self._streamed(plan, every)
            for region in every:
                region.watch(self.chip_size, shared=self._workers(every) > 0)

    def _cut(self, spec: ModelSpec) -> dict[Use, list[Region]]:
        grids: dict[str, GeoBox] = {}
        for name, ds in zip(self.names, self.scenes, strict=True):
            grids[name] = check_scene(ds, [*spec.layers, spec.target])
        wanted = tuple(dict.fromkeys((*spec.layers, "dsm", spec.target)))
        regions: dict[Use, list[Region]] = {"train": [], "val": [], "test": []}
        cuts = self.split.parts(grids, self.chip_size)
        for i, (ds, parts) in enumerate(zip(self.scenes, cuts, strict=True)):
            reader = SceneReader(ds, wanted)
            planes = _planes(spec, reader.shape)
            for use, some in parts.items():
                regions[use] += [
                    Region(reader, part, spec.channels, spec.target, planes, scene=i)
                    for part in some
                    if min(part.box.shape) >= self.chip_size
                ]
        if not regions["train"]:
            raise ValueError(
                f"no training chip: no part for training of {self.split} is {self.chip_size} px "
                "wide: pass a smaller chip_size or another split"
            )
        return regions

    def _spec(self) -> ModelSpec:
        """Return what the model that is trained wants to see."""
        spec = getattr(self.trainer.lightning_module, "spec", None) if self.trainer else None
        if not isinstance(spec, ModelSpec):
            raise ValueError(
                "ChipDataModule asks the model for its layers: train a deepdem.DeepDEM with "
                "trainer.fit(model, data)"
            )
        return spec

    # --- memory and processes --------------------------------------------------------------------

    def _limit(self) -> int:
        """Return how many bytes may be held."""
        if isinstance(self.cache, bool) or self.cache == "auto":
            return int(psutil.virtual_memory().available) // 4
        limit: int = parse_bytes(self.cache)
        return limit

    def _holds(self, regions: Sequence[Region]) -> bool:
        if isinstance(self.cache, bool):
            return self.cache
        needed, limit = sum(region.nbytes for region in regions), self._limit()
        if self._workers(regions) and self.cache == "auto":
            return needed <= min(limit, shared_room() / 2)
        return needed <= limit

    def _workers(self, regions: Sequence[Region]) -> int:
        if isinstance(self.num_workers, int):
            return self.num_workers
        streamed = not any(region.held for region in regions) and self._plan is not None
        direct = all(region.reader.is_direct for region in regions)
        return min(2, CPU_COUNT) if streamed and direct else 0

    def _streamed(self, plan: Plan, regions: Sequence[Region]) -> Plan:
        groups = len(self.scenes) if plan.evenly else 1
        streams = LANES * self._world[0]
        area = sum(r.box.shape[0] * r.box.shape[1] for r in self.regions["train"])
        width, open_tiles = tiling(
            area, size=plan.size, planes=len(regions[0].names), streams=LANES, groups=groups,
            limit=self._limit(),
        )  # fmt: skip
        return replace(plan, tile_px=width, open_tiles=open_tiles, streams=streams)

    @property
    def _world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    @property
    def _pins(self) -> bool:
        """Whether training is on a CUDA card."""
        strategy = getattr(self.trainer, "strategy", None)
        return getattr(getattr(strategy, "root_device", None), "type", "cpu") == "cuda"

    # --- the loaders -----------------------------------------------------------------------------

    def _places(self) -> int:
        """Return how many places there are; in memory: how many of them are worth having."""
        plan, train = self._set_up(), self.regions["train"]
        if any(region.held is None for region in train):
            return sum(plan.places(region).count for region in train)
        found = 0
        for region in train:
            usable = region.open(region.box).usable
            places = plan.places(region)
            for k in range(places.tiles):
                tile = places.tile(k, jitter=False)
                for y, x in zip(tile.y - region.box.y0, tile.x - region.box.x0, strict=True):
                    found += plan.enough(usable[y : y + plan.size, x : x + plan.size])
        return found

    def _set_up(self) -> Plan:
        if self._plan is None:
            raise ValueError("the data module is not set up: trainer.fit(model, data) does it")
        return self._plan

    def train_dataloader(self) -> TrainLoader:
        """Return the training chips, drawn and moved anew in each epoch."""
        plan, train = self._set_up(), self.regions["train"]
        chips = self.chips_per_epoch or self._places()
        batches = TrainBatches(train, plan, batch_size=self.batch_size, chips=chips)
        world, rank = self._world
        if len(batches) < world:
            raise ValueError(
                f"an epoch of {chips} chips has no batch for each of {world} training processes: "
                "pass a smaller batch_size, or chips_per_epoch="
            )
        begin = self._resumed or {"epoch": self.trainer.current_epoch if self.trainer else 0}
        self._loader = train_loader(
            batches, workers=self._workers(train), world=world, rank=rank, pin=self._pins, **begin
        )
        self._resumed = {}
        return self._loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Return the validation chips: the same ones, in the same order, each time.

        When it is first asked for, the DSM and the truth of the tiles they lie in are read.
        """
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Return the test chips, as validation's; none if the split has no part for the test."""
        return self._fixed_loader("test")

    def _fixed_loader(self, use: Use) -> DataLoader[Batch] | list[Any]:
        plan, regions = self._set_up(), self.regions[use]
        if use not in self._fixed:
            chips = fixed_chips(regions, plan, self.val_chips)
            self._fixed[use] = FixedBatches(regions, chips, batch_size=self.batch_size)
        batches = self._fixed[use]
        if not len(batches):
            return []
        # To start processes takes longer than to read so few chips here.
        workers = self.num_workers if isinstance(self.num_workers, int) else 0
        return fixed_loader(batches, workers=workers)

    def state_dict(self) -> dict[str, Any]:
        """Return where training is: the epoch, and how many of its batches have been seen."""
        if self._loader is None or self.trainer is None:
            return {}
        state = self._loader.state_dict()
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return {"epoch": state["epoch"] + 1, "batch": 0}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin there.

        Lightning would tell the loader as well, but not where the optimizer's schedule has asked
        for the loader's length before: then it has been made, and is not told any more.
        """
        self._resumed = dict(state)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch."""
        if self.trainer is None or not self.trainer.training or not self.augment:
            return batch
        draw = np.random.default_rng((self.seed, self.trainer.global_step, self._world[1]))
        return augmented(batch, self.channels, self.augment, draw)

    # --- what the training regions have in common ------------------------------------------------

    def statistics(self) -> Statistics:
        """Return the DSM scale and the layers' mean and spread over the training regions; computes.

        Of regions that are not held in memory they are taken from 64 tiles, drawn by the seed.

        Raises
        ------
        ValueError
            No chip of the training regions is half valid, or the DSM is flat.
        """
        stds, sums = [], np.zeros((len(self.layers), 3))
        for some, moments in self._sampled():
            stds += some
            sums += moments
        scale = robust_mean(np.array(stds, dtype=np.float64))
        if not scale > 0:
            raise ValueError(
                f"no DSM scale: no chip of {self.chip_size} px in the training region is half "
                "valid, or its surface is flat: pass dsm_scale= or a smaller chip_size"
            )
        count = np.maximum(sums[:, 0], 1)
        means = sums[:, 1] / count
        spread = np.sqrt(np.maximum(sums[:, 2] / count - means**2, 0))
        return Statistics(
            dsm_scale=scale,
            pixel_size=float(np.mean([pixel_size(ds) for ds in self.scenes])),
            means=dict(zip(self.layers, means.tolist(), strict=True)),
            # A layer that is the same everywhere tells nothing; it must not divide by zero.
            stds=dict(zip(self.layers, np.where(spread > 0, spread, 1.0).tolist(), strict=True)),
            scenes=self.names,
        )

    def _sampled(self) -> Iterator[tuple[list[float], np.ndarray[Any, Any]]]:
        """Yield of each tile its chips' standard deviations and its layers' moments."""
        plan, train = self._set_up(), self.regions["train"]
        size = plan.size
        places = [Places(region.box, size, size, max(plan.tile_px, size)) for region in train]
        tiles = [(i, k) for i, p in enumerate(places) for k in range(p.tiles)]
        if any(region.held is None for region in train) and len(tiles) > _SAMPLED_TILES:
            draw = np.random.default_rng((self.seed, 4))
            tiles = [tiles[i] for i in draw.permutation(len(tiles))[:_SAMPLED_TILES]]
        for i, k in tiles:
            tile, core = places[i].tile(k, jitter=False), places[i].core(k)
            arrays = dict(zip(self.layers, train[i].read(self.layers, tile.box), strict=True))
            yield (
                _stds(arrays["dsm"], tile.y - tile.box.y0, tile.x - tile.box.x0, size),
                np.array([_moments(a[core.within(tile.box)]) for a in arrays.values()]),
            )


def augmented(
    batch: Batch, layers: Sequence[str], kinds: Sequence[str], draw: np.random.Generator
) -> Batch:
    """Return the batch changed as drawn: one symmetry for all its chips; noise and voids in each.

    Layers, target and planes are flipped and turned alike. Noise and voids are the DSM's alone.
    """
    out = dict(batch)
    if "swap" in kinds and {"ortho_left", "ortho_right"} <= set(layers) and draw.random() < 0.5:
        order = list(range(out["layers"].shape[1]))
        left, right = layers.index("ortho_left"), layers.index("ortho_right")
        order[left], order[right] = right, left
        out["layers"] = out["layers"][:, order]
    if "noise" in kinds or "voids" in kinds:
        dsm = layers.index("dsm")
        heights = out["layers"][:, dsm]
        if "noise" in kinds:
            heights = _noisy(heights, out["target"], draw)
        if "voids" in kinds:
            heights = _voided(heights, draw)
        out["layers"] = out["layers"].clone()
        out["layers"][:, dsm] = heights
    dims = [d for d in (-2, -1) if "flip" in kinds and draw.random() < 0.5]
    turns = int(draw.integers(4)) if "rotate" in kinds else 0
    return {key: torch.rot90(torch.flip(t, dims), turns, (-2, -1)) for key, t in out.items()}


def _noisy(dsm: Tensor, target: Tensor, draw: np.random.Generator) -> Tensor:
    """Return heights with noise: half of it pixel by pixel, half as wide as an eighth of a chip.

    Its size goes by the error that is there, so that no scene needs a number of its own.
    """
    error = (dsm - target).abs()
    size = torch.nanmean(error.flatten(1), dim=1).nan_to_num()
    size = size * torch.from_numpy(draw.uniform(0, 0.25, len(dsm))).to(size)
    rough = torch.from_numpy(draw.standard_normal(dsm.shape, dtype=np.float32)).to(dsm)
    coarse = torch.from_numpy(draw.standard_normal((len(dsm), 1, 8, 8), dtype=np.float32)).to(dsm)
    smooth = torch.nn.functional.interpolate(coarse, dsm.shape[1:], mode="bicubic")[:, 0]
    return dsm + size[:, None, None] * (rough + smooth) / 2**0.5


def _voided(dsm: Tensor, draw: np.random.Generator) -> Tensor:
    """Return heights with up to four voids a chip, a quarter of its width at most."""
    out = dsm.clone()
    height, width = dsm.shape[1:]
    for chip in out:
        for _ in range(draw.integers(5)):
            tall, wide = (int(draw.integers(1, max(n // 4, 1) + 1)) for n in (height, width))
            y, x = int(draw.integers(height - tall + 1)), int(draw.integers(width - wide + 1))
            chip[y : y + tall, x : x + wide] = torch.nan
    return out


def _planes(spec: ModelSpec, shape: tuple[int, int]) -> tuple[Plane, ...]:
    """Return the channels of a model that a scene of `shape` does not have."""
    if spec.centering != "local":
        return ()
    level = partial(local_level, chip_px=spec.chip_size)
    return (Plane("dsm_level", ("dsm",), level, LevelRegion(spec.chip_size, shape)),)


def _stds(dsm: Any, ys: Any, xs: Any, size: int) -> list[float]:
    """Return the standard deviation of heights of those chips that are half valid."""
    found = []
    for y, x in zip(ys, xs, strict=True):
        values = dsm[y : y + size, x : x + size]
        heights = values[np.isfinite(values)].astype(np.float64)
        if 2 * heights.size >= values.size:
            found.append(float(np.float32(heights.std())))
    return found


def _moments(layer: Any) -> list[float]:
    """Return count, sum and sum of squares of the finite values."""
    values = layer[np.isfinite(layer)].astype(np.float64)
    return [float(values.size), float(values.sum()), float(np.dot(values, values))]


def _named(
    scenes: xr.Dataset | xr.DataTree | Sequence[xr.Dataset],
) -> tuple[list[str], list[xr.Dataset]]:
    """Return the scenes and their names, all different."""
    if isinstance(scenes, xr.DataTree):
        nodes = [node for node in scenes.leaves if node.has_data]
        return [node.path.strip("/") or "scene" for node in nodes], [n.to_dataset() for n in nodes]
    listed = [scenes] if isinstance(scenes, xr.Dataset) else list(scenes)
    if not listed:
        raise ValueError("no scene to train on: pass [ds, ...]")
    names: list[str] = []
    for i, ds in enumerate(listed):
        name = str(ds.attrs.get("name") or ds.attrs.get("title") or f"scene {i}")
        names.append(name if name not in names else f"{name} ({i})")
    return names, listed
