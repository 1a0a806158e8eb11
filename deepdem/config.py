"""The YAML that lists scenes: read, checked, and every file of it found.

What is wrong with the file itself is an error before anything is built; what is wrong with one
scene's inputs is that scene's failure.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr
import yaml

from deepdem.derive import equalise, prepare
from deepdem.runs import open_asp, open_deepdem
from deepdem.scene import stack
from deepdem.sources.folder import find_asp, find_deepdem, find_layers
from deepdem.store import scene_to_zarr

__all__ = ["SceneConfig", "read_config", "token_of"]

Options = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """Who lays rasters out in a folder like that: how they are found, and how they are opened."""

    find: Callable[..., Mapping[str, Any]]
    open: Callable[..., xr.Dataset] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        return () if self.open is None else _options(self.open, but=("layers",))


_KINDS = {
    "folder": _Kind(find_layers),
    "asp": _Kind(find_asp, open_asp),
    "deepdem": _Kind(find_deepdem, open_deepdem),
}
#: What values of an option may be; those of options that are not listed are left to the function.
_TYPES: dict[str, tuple[type, ...]] = {
    "like": (str,), "crs": (str, int), "resolution": (int, float), "bounds": (str, list),
    "resampling": (str, dict), "chunks": (int,), "vertical_crs": (str, int), "heights": (dict,),
    "needs": (str, list), "equalise_orthos": (bool, dict), "error_max_m": (int, float),
    "fill_error": (bool,), "add": (str, list), "precision_m": (int, float), "dem": (str,),
    "lidar": (str,), "equalised": (bool,),
}  # fmt: skip
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
          list: "a list", dict: "keys and values"}  # fmt: skip


def _options(function: Callable[..., Any], *, but: tuple[str, ...] = ()) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in but)


_SECTIONS = {
    "stack": _options(stack),
    "prepare": _options(prepare),
    "write": _options(scene_to_zarr, but=("group", "overwrite")),
}
_SCENE_KEYS = ("layers", *_KINDS, *_SECTIONS)


@dataclass(frozen=True)
class Folder:
    """A folder of rasters: its kind, its path or glob, and options of how that kind is opened."""

    kind: str
    pattern: str
    options: Options


@dataclass(frozen=True)
class SceneConfig:
    """One scene of a configuration, its files not yet looked for.

    Attributes
    ----------
    name
        Of the scene, and of its group in the store.
    base
        What relative paths start from, unless there is a folder.
    layers
        Layers by name: a path, a URL or a glob, or ``(path, band)``.
    folder
        A folder that paths start from. Its layers come first, but those of the kind ``folder``
        only where `layers` names none.
    stack, prepare, write
        Options of `deepdem.stack`, of `deepdem.derive.prepare` and of
        `deepdem.store.scene_to_zarr`.
    """

    name: str
    base: Path
    layers: Mapping[str, Any]
    folder: Folder | None
    stack: Options
    prepare: Options
    write: Options

    def sources(self) -> dict[str, Any]:
        """Return the layers by name, every file found.

        Raises
        ------
        FileNotFoundError
            A glob or a path leads nowhere.
        ValueError
            A glob matches several files.
        """
        return {**self._in_folder(), **self._named()}

    def open(self) -> xr.Dataset:
        """Return the stacked scene, lazy; raises what `sources` and `deepdem.stack` raise."""
        kind = None if self.folder is None else _KINDS[self.folder.kind]
        if self.folder is None or kind is None or kind.open is None:
            return stack(self.sources(), **self.stack)
        return kind.open(self._top(), layers=self._named(), **self.folder.options, **self.stack)

    def _top(self) -> Path:
        if self.folder is None:
            return self.base
        return Path(self._one(self.folder.kind, self.folder.pattern, self.base))

    def _in_folder(self) -> dict[str, Any]:
        if self.folder is None or (self.folder.kind == "folder" and self.layers):
            return {}
        find = _KINDS[self.folder.kind].find
        known = _options(find)
        options = {k: v for k, v in self.folder.options.items() if k in known}
        return dict(find(self._top(), **options))

    def _named(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        base = self._top()
        for layer, source in self.layers.items():
            path, band = source if isinstance(source, tuple) else (source, None)
            one = self._one(layer, path, base)
            found[layer] = one if band is None else (one, band)
        return found

    def _one(self, key: str, pattern: str, base: Path) -> str:
        if "://" in pattern or pattern.startswith("/vsi") or ":" in pattern.split("/")[0]:
            return pattern  # a URL, or a name that is GDAL's own
        path = Path(pattern).expanduser()
        whole = str(path if path.is_absolute() else base / path)
        if Path(whole).exists():
            return whole
        matches = sorted(glob.glob(whole, recursive=True))  # noqa: PTH207  # it may be absolute
        if len(matches) == 1:
            return matches[0]
        if not matches:
            raise FileNotFoundError(
                f"scene {self.name!r}, {key}: nothing matches {pattern!r} in {base}"
            )
        shown = ", ".join(Path(match).name for match in matches[:3])
        raise ValueError(
            f"scene {self.name!r}, {key}: {pattern!r} matches {len(matches)} files ({shown}"
            f"{', …' if len(matches) > 3 else ''}), and a layer is one: narrow the pattern, or "
            "make one of them (gdalbuildvrt all.vrt FILES)"
        )

    def recipe(self, sources: Mapping[str, Any]) -> Options:
        """Return what must be the same for a scene to be the same, as JSON has it.

        Files count by their path from the configuration, size and time of change.
        """
        folder = {} if self.folder is None else {self.folder.kind: self.folder.options}
        return {
            "layers": {name: self._stamp(source) for name, source in sources.items()},
            "folder": folder,
            "stack": self.stack,
            "prepare": self.prepare,
            "write": self.write,
        }

    def _stamp(self, source: Any) -> Any:
        if isinstance(source, tuple):
            return [self._stamp(source[0]), source[1]]
        path = Path(str(source))
        if not path.is_file():
            return str(source)
        within = path.relative_to(self.base) if path.is_relative_to(self.base) else path
        stat = path.stat()
        return [within.as_posix(), stat.st_size, stat.st_mtime_ns]


def token_of(recipe: Options) -> str:
    """Return the hash of a scene's recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def read_config(config: str | Path | Mapping[str, Any]) -> list[SceneConfig]:
    """Return the scenes that a configuration lists, in its order.

    Parameters
    ----------
    config
        A YAML file, or what is in it. Relative paths start from the file's folder, or from the
        current one.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no YAML, a key is not known, or a value is not what it should be: the message names
        the scene, the key, what came and what was wanted.
    """
    base = Path.cwd()
    if not isinstance(config, Mapping):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such configuration")
        base = path.resolve().parent
        try:
            config = _Loader(path.read_text(encoding="utf-8")).get_single_data()
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
    whole = _mapping("the configuration", config)
    _known("the configuration", whole, ("scenes", *_SECTIONS))
    if not whole.get("scenes"):
        raise ValueError("the configuration lists no scene: wanted scenes: {name: {layers: ...}}")
    shared = {section: _section("the configuration", whole, section) for section in _SECTIONS}
    scenes: list[SceneConfig] = []
    for name, raw in _mapping("scenes", whole["scenes"]).items():
        scenes += _scenes(str(name), raw, base, shared)
    names = [scene.name for scene in scenes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the scenes {twice} are listed twice: each needs a name of its own")
    return scenes


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML's safe loader, but for a key that stands twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} stands twice", problem_mark=node.start_mark
                )
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _scenes(name: str, raw: Any, base: Path, shared: Mapping[str, Options]) -> list[SceneConfig]:
    where = f"scene {name!r}"
    if "/" in name or name.startswith((".", "_")) or not name.strip():
        raise ValueError(f"{where}: a name is a group of the store: no /, and no . or _ in front")
    scene = _mapping(where, raw)
    _known(where, scene, _SCENE_KEYS)
    layers = {
        str(layer): _source(f"{where}, layers: {layer}", source)
        for layer, source in _mapping(f"{where}, layers", scene.get("layers") or {}).items()
    }
    kinds = [kind for kind in _KINDS if kind in scene]
    if not layers and not kinds:
        raise ValueError(f"{where}: wanted layers: {{dsm: FILE, ...}}, or one of {list(_KINDS)}")
    if len(kinds) > 1:
        raise ValueError(f"{where}: {kinds} are both given, wanted one of them")
    folder = _folder(f"{where}, {kinds[0]}", kinds[0], scene[kinds[0]]) if kinds else None
    options = {
        section: {**shared[section], **_section(where, scene, section)} for section in _SECTIONS
    }
    if "*" not in name:
        return [SceneConfig(name, base, layers, folder, **options)]
    # One scene a folder, whose name stands for the star.
    if folder is None:
        raise ValueError(f"{where}: a * stands for a folder's name: add folder: GLOB OF FOLDERS")
    matches = sorted(glob.glob(str(base / folder.pattern)))  # noqa: PTH207  # it may be absolute
    matches = [m for m in matches if Path(m).is_dir()]
    if not matches:
        raise FileNotFoundError(
            f"{where}, {folder.kind}: no folder matches {folder.pattern!r} in {base}"
        )
    return [
        SceneConfig(
            name.replace("*", Path(m).name), base, layers, replace(folder, pattern=m), **options
        )
        for m in matches
    ]


def _folder(where: str, kind: str, raw: Any) -> Folder:
    if isinstance(raw, str):
        return Folder(kind, raw, {})
    _known(where, _mapping(where, raw), ("folder", *_KINDS[kind].options))
    options = {key: value for key, value in raw.items() if key != "folder"}
    for key, value in options.items():
        _typed(f"{where}: {key}", value, _TYPES.get(key, (object,)))
    return Folder(kind, _typed(f"{where}: folder", raw.get("folder"), (str,)), options)


def _source(where: str, raw: Any) -> Any:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, Mapping):
        _known(where, raw, ("path", "band"))
        if "path" in raw:
            path = _typed(f"{where}, path", raw["path"], (str,))
            band = _typed(f"{where}, band", raw.get("band", 1), (int,))
            return path, band
    raise ValueError(f"{where}: wanted a path or {{path: FILE, band: NUMBER}}, got {raw!r}")


def _section(where: str, holder: Mapping[str, Any], section: str) -> Options:
    found = _mapping(f"{where}, {section}", holder.get(section) or {})
    _known(f"{where}, {section}", found, _SECTIONS[section])
    for key, value in found.items():
        if key in _TYPES:
            _typed(f"{where}, {section}: {key}", value, _TYPES[key])
    if isinstance(found.get("equalise_orthos"), Mapping):
        _known(f"{where}, {section}: equalise_orthos", found["equalise_orthos"], _options(equalise))
    if isinstance(found.get("bounds"), list):
        found = {**found, "bounds": tuple(found["bounds"])}
    return dict(found)


def _typed(where: str, value: Any, kinds: tuple[type, ...]) -> Any:
    # To Python true is a number; to whoever writes chunks: true it is not.
    good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not good:
        wanted = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"{where}: wanted {wanted}, got {value!r}")
    return value


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: wanted keys and values, got {value!r}")
    return value


def _known(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: {key!r} is not known{hint} (wanted {', '.join(known)})")
