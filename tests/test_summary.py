"""A scene's description: what is in it, what is computed for it, and that it is only text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import dask.array as da
import matplotlib.image
import numpy as np
import pytest
import xarray as xr

import deepdem
from deepdem.statistics import plan_statistics
from deepdem.summary import summary

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


class Tags(HTMLParser):
    """Collects tags and text, and whether each tag is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(scene: xr.Dataset) -> Tags:
    tags = Tags()
    tags.feed(summary(scene)._repr_html_())
    assert tags.open == []
    return tags


def test_it_says_what_is_in_the_scene(scene: xr.Dataset, tmp_path: Any) -> None:
    scene.deepdem.to_zarr(tmp_path / "s.zarr", group="a")
    stored = deepdem.open_scene(tmp_path / "s.zarr", "a")
    found = plan_statistics(scene, pixel_size_m=1.0).compute()
    for said in (repr(stored.deepdem.summary()), parsed(stored).text):
        for name in scene.data_vars:
            assert str(name) in said
        for words in ("300 x 260 pixels", "EPSG:32610", "all pixels", "DSM scale", "256 px"):
            assert words in said
        assert f"{found['layers']['dsm']['mean']:.4g}" in said
        assert f"{found['valid']:.1%}" in said
    tags = parsed(stored)
    assert '"prepare"' in tags.text
    assert "initial stereo digital surface model" in tags.text


def test_without_statistics_those_of_the_pictures_are_told(scene: xr.Dataset) -> None:
    (row, *_) = summary(scene).rows
    assert summary(scene).sample == "one pixel in 3 x 3"
    assert row.mean == pytest.approx(float(scene.dsm.mean()), rel=0.01)
    small = scene.isel(y=slice(0, 40), x=slice(0, 50))
    assert summary(small).sample == "all pixels"
    (row, *_) = summary(small).rows
    assert row.mean == pytest.approx(float(small.dsm.mean()), rel=1e-5)
    assert row.share == pytest.approx(float(np.isfinite(small.dsm).mean()))


def test_each_layer_has_a_small_picture(scene: xr.Dataset) -> None:
    pictures = re.findall(r"base64,([^']+)'", summary(scene)._repr_html_())
    assert len(pictures) == len(scene.data_vars)
    for picture, name in zip(pictures, scene.data_vars, strict=True):
        image = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)), format="png")
        assert image.shape == (100, 87, 4)
        if scene[name].dtype.kind == "f":  # no data is see-through
            part = scene[name].values[1::3, 1::3]
            np.testing.assert_array_equal(image[..., 3] == 1, np.isfinite(part))
            assert image[..., :3].std() > 0.02


def test_it_computes_once_and_little(scene: xr.Dataset) -> None:
    kept, calls = [], []

    def read(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        return block

    lazy = scene[["dsm", "ortho_left"]].chunk(100)
    for name in lazy.data_vars:
        data = da.map_blocks(read, lazy[name].data, meta=np.empty((0, 0), np.float32))
        lazy[name] = lazy[name].copy(data=data)
    kept.append(summary(lazy))
    assert len(calls) == 2 * 9


def test_what_came_with_the_data_is_text_and_no_markup(scene: xr.Dataset) -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)> \x1b[31m\u202egnp.exe"
    bad = scene[["dsm", "ortho_left"]].rename(ortho_left="<b onload='x'>")
    bad["dsm"].attrs = dict.fromkeys(("long_name", "units", "source", "vertical_reference"), evil)
    bad.attrs = {"deepdem_provenance": {evil: [evil]}, "title": evil}
    tags = parsed(bad)
    assert "script" not in tags.seen
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert "alert(1)" in tags.text
    for text in (tags.text, repr(summary(bad))):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert tags.seen <= {"div", "style", "b", "i", "br", "img", "table", "thead", "tbody", "tr",
                         "th", "td", "details", "summary", "pre"}  # fmt: skip
    bad.attrs["deepdem_provenance"] = evil
    found = plan_statistics(bad, pixel_size_m=1.0).compute()
    for layers in (evil, {"dsm": evil}, {"dsm": {"mean": evil, "percentiles": evil}}):
        bad.attrs["deepdem_statistics"] = {**found, "layers": layers, "dsm_scale": {evil: evil}}
        assert "script" not in parsed(bad).seen


def test_odd_scenes_are_described_too(scene: xr.Dataset) -> None:
    empty = scene[["dsm", "ortho_left", "triangulation_error"]] * np.float32("nan")
    assert [row.mean for row in summary(empty.rio.write_crs(32610)).rows] == [None] * 3
    parsed(empty.rio.write_crs(32610))
    flat = (scene[["dsm", "ndvi"]] * 0).rio.write_crs(32610)
    parsed(flat)
    parsed(scene.isel(y=slice(0, 2), x=slice(0, 2)))
    with pytest.raises(ValueError, match="no CRS"):
        summary(scene.drop_vars("spatial_ref"))
