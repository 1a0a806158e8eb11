from __future__ import annotations

import pickle
import shutil
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
import xarray as xr

import deepdem
from deepdem.legacy import _plain


def _scene(layers: dict[str, np.ndarray]) -> xr.Dataset:
    """A scene of one window from plain arrays."""
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import xr_coords

    shape = next(iter(layers.values())).shape
    box = GeoBox.from_bbox((5e5, 4e6, 5e5 + shape[1], 4e6 + shape[0]), crs=32610, resolution=1)
    return xr.Dataset({n: (("y", "x"), a) for n, a in layers.items()}, xr_coords(box))


def test_deepdem_refines_with_its_own_numbers(data_folder, tmp_path):
    model = deepdem.import_checkpoint(data_folder / "compat/deepdem.ckpt", kind="deepdem")
    assert model.layers == [
        "dsm", "ortho_left", "ortho_right", "ndvi", "valid", "triangulation_error"
    ]  # fmt: skip
    assert (model.spec.chip_size, model.dsm_scale) == (256, 30.0)
    known = np.load(data_folder / "compat/deepdem_io.npz")
    with torch.no_grad():
        heights = model(torch.from_numpy(known["x"]))
    np.testing.assert_allclose(heights, known["y"], atol=1e-3)
    model.save(tmp_path / "m.safetensors")
    scene = _scene(dict(zip(model.layers, known["x"][0], strict=True)))
    refined = scene.deepdem.refine(tmp_path / "m.safetensors").compute()
    there = refined.notnull()  # its valid layer has zeros
    np.testing.assert_allclose(refined.values[there], known["y"][0][there], atol=1e-3)
    assert float(abs(refined - scene.dsm).max()) > 1


@pytest.mark.parametrize("what", ["", "Model_best.pth"])
def test_resdepth_refines_with_its_own_numbers(data_folder, what):
    model = deepdem.import_checkpoint(data_folder / "compat" / what, kind="resdepth", chip_size=128)
    assert model.layers == ["dsm", "ortho_left", "ortho_right"]
    assert model.dsm_scale == 12.5
    known = np.load(data_folder / "compat/resdepth_io.npz")
    arrays = {"dsm": known["dsm"][0, 0], "ortho_left": known["ortho"][0, 0],
              "ortho_right": known["ortho"][0, 1]}  # fmt: skip
    refined = _scene(arrays).deepdem.refine(model).compute()
    np.testing.assert_allclose(refined, known["y"][0, 0], atol=1e-3)


def _checkpoint(path, **change):
    """A DeepDEM checkpoint of ResDepth's U-Net, with weights of our own."""
    from deepdem.models import ModelSpec, build_network

    torch.manual_seed(0)
    spec = ModelSpec(("dsm", "ndvi"), architecture="resdepth", chip_size=64,
                     options={"start_kernel": 4, "depth": 3, "do_bn": False})  # fmt: skip
    state = {f"model.{k}": v for k, v in build_network(spec).state_dict().items()}
    settings = {
        "model": "unet", "bands": ["asp_dsm", "ndvi", "lidar_data"], "chip_size": 64,
        "datapath": PurePosixPath("a/b"), **change,
    }  # fmt: skip
    torch.save({"state_dict": state, "hyper_parameters": settings}, path)
    return path


def test_a_u_net_without_a_scale_of_its_own_has_the_default(tmp_path):
    model = deepdem.import_checkpoint(_checkpoint(tmp_path / "a.ckpt"))
    assert model.dsm_scale == 9.86
    assert model.spec.options["depth"] == 3
    assert model.spec.options["do_bn"] is False


def test_what_has_no_equal_says_so(tmp_path, data_folder):
    with pytest.raises(NotImplementedError, match="no band 'asp_dsm'"):
        deepdem.import_checkpoint(_checkpoint(tmp_path / "a.ckpt", bands=["ndvi", "lidar_data"]))
    with pytest.raises(NotImplementedError, match="model='transformer'"):
        deepdem.import_checkpoint(_checkpoint(tmp_path / "a.ckpt", model="transformer"))
    with pytest.raises(ValueError, match="scales only for"):
        deepdem.import_checkpoint(_checkpoint(tmp_path / "a.ckpt", GSF_DICT={128: 2.0}))
    bands = ["asp_dsm", "ndvi", "red", "lidar_data"]
    with pytest.raises(ValueError, match="do not fit the 'resdepth'"):
        deepdem.import_checkpoint(_checkpoint(tmp_path / "a.ckpt", bands=bands))
    with pytest.raises(ValueError, match="kind='other'"):
        deepdem.import_checkpoint(tmp_path / "a.ckpt", kind="other")
    copy = tmp_path / "resdepth"
    shutil.copytree(data_folder / "compat", copy)
    config = copy / "model_config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace('"outer_skip": true', '"outer_skip": false'))
    with pytest.raises(NotImplementedError, match="outer_skip=False"):
        deepdem.import_checkpoint(copy, kind="resdepth")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_nothing_pickled_is_executed(tmp_path):
    flag = tmp_path / "ran"
    torch.save({"state_dict": {}, "hyper_parameters": _Evil(flag)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="more than containers, numbers, tensors and paths"):
        deepdem.import_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "n.p").write_bytes(pickle.dumps({"mean": _Evil(flag)}))
    with pytest.raises(ValueError, match=r"asks for (builtins|pathlib)\.\w+.*strangers"):
        _plain(tmp_path / "n.p")
    assert not flag.exists()
    (tmp_path / "n.p").write_bytes(pickle.dumps({"mean": None, "std": np.float64(2.5)}))
    assert _plain(tmp_path / "n.p") == {"mean": None, "std": 2.5}
