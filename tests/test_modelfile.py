from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import LAYERS, fitted
from test_models import Plain

import deepdem
from deepdem.modelfile import read_model, serialise, weights_hash


def test_the_file_holds_all_that_refine_needs(tmp_path):
    model = fitted()
    model.net.spec = replace(model.spec, training={"scenes": ["a"], "validation": {"val_MAE": 1.0}})
    path = tmp_path / "m.safetensors"
    model.save(path)
    again = deepdem.load_model(path)
    assert replace(again.spec, training={}) == replace(model.spec, training={})
    assert again.spec.training["scenes"] == ["a"]
    assert again.spec.training["versions"]["torch"]
    assert weights_hash(again.net) == weights_hash(model.net)
    x = torch.randn(1, len(LAYERS), 64, 64)
    with torch.no_grad():
        np.testing.assert_array_equal(again(x), model(x))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with safetensors.safe_open(path, "pt") as file:  # any safetensors reader sees it
        assert json.loads(file.metadata()["deepdem"])["spec"]["layers"] == list(LAYERS)


def test_an_untrained_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no DSM scale"):
        deepdem.DeepDEM(["dsm"], architecture="resdepth").save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_strangers_files_are_refused_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is no deepdem model file"):
        read_model(evil)
    assert not (tmp_path / "ran").exists()
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="is no deepdem model file"):
        read_model(other)
    with pytest.raises(FileNotFoundError):
        read_model(tmp_path / "none.safetensors")


def _changed(content, change):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["deepdem"])
    change(described)
    header["__metadata__"]["deepdem"] = json.dumps(described)
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + content[8 + length :]


def _rewritten(path, change):
    return _changed(path.read_bytes(), change)


def test_a_file_from_before_local_centring_is_centred_on_chips(tmp_path):
    path = tmp_path / "m.safetensors"
    fitted().save(path)

    def forget(described):
        del described["spec"]["centering"], described["spec"]["reach_px"]

    assert read_model(_rewritten(path, forget)).spec.centering == "chip"
    fitted(centering="local").save(path)
    again = read_model(path).spec
    assert (again.centering, again.reach_px) == ("local", math.inf)
    with pytest.raises(ValueError, match="'chip' or 'local'"):
        read_model(_rewritten(path, lambda d: d["spec"].update(centering="moon")))
    with pytest.raises(ValueError, match="reach_px=-1"):
        read_model(_rewritten(path, lambda d: d["spec"].update(reach_px=-1)))


def test_a_newer_or_broken_file_says_so(tmp_path):
    path = tmp_path / "m.safetensors"
    fitted().save(path)
    with pytest.raises(ValueError, match="upgrade deepdem"):
        read_model(_rewritten(path, lambda d: d.update(format=99)))
    with pytest.raises(ValueError, match=r"are not those of its network: .*wanted"):
        read_model(_rewritten(path, lambda d: d["spec"].update(layers=["dsm"])))
    with pytest.raises(ValueError, match=r"network.decoder.*wanted"):
        read_model(
            _rewritten(
                path, lambda d: d["spec"]["options"].update(decoder_channels=[16, 16, 8, 8, 9])
            )
        )
    with pytest.raises(ValueError, match=r"\['colour'\], which is not known here: .* upgrade"):
        read_model(_rewritten(path, lambda d: d["spec"].update(colour=1)))


def test_the_hash_is_of_what_changes_the_numbers():
    one, two = fitted(), fitted()
    assert weights_hash(one.net) == weights_hash(two.net)
    two.net.spec = replace(two.spec, training={"scenes": ["b"]})
    assert weights_hash(one.net) == weights_hash(two.net)
    two.net.spec = replace(two.spec, dsm_scale=5.1)
    assert weights_hash(one.net) != weights_hash(two.net)
    assert math.isnan(deepdem.DeepDEM(["dsm"], architecture="resdepth").spec.dsm_scale)


SPOILT = {
    "dsm_scale": [math.nan, math.inf, 0, -3.0, "five", None, True],
    "temperature": [0.0, math.inf],
    "intervals": [{}, {"68": 1.0}, {"68": 0.8, "95": math.nan}, {"68": "1", "95": 2.0}],
    "tta_intervals": [[], {"68": 0.0}, {"68": "1"}, {"68": 1.0}],
    "pixel_size": [-1.0, "1"],
    "layers": ["dsm", [], [1, 2], ["dsm"] * 2, ["dsm", *(f"ortho_{n}" for n in range(1, 99))]],
    "target": ["ndvi", 3],
    "architecture": ["os.system", "../x", "own"],
    "encoder": ["tu-hf-hub:a/b", 7],
    "chip_size": [0, 48, 1 << 20, 64.5, True],
    "stds": [{}, {"ortho_left": 0.0}, {"ortho_left": "1"}, []],
    "means": [{}, {"ortho_left": math.inf}],
    "options": [[], {"decoder_channels": [1 << 30] * 5}, {"decoder_channels": [16] * 1000},
                {"decoder_channels": {"a": 1}}, {"colour": 1}, {"depth": 4096}],
    "clip": [0, "no"],
    "training": ["none"],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SPOILT))
def test_a_stranger_s_description_is_checked(name):
    content = serialise(fitted().net)
    for value in SPOILT[name]:
        with pytest.raises(ValueError, match=r"the model file"):
            read_model(_changed(content, lambda d, v=value: d["spec"].update({name: v})))


def test_a_description_asks_for_no_more_memory_than_the_file_holds():
    """Two gigabytes of decoder are refused before a byte of them is allocated."""
    import resource

    content = serialise(fitted().net)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = _changed(content, lambda d: d["spec"]["options"].update(decoder_channels=[8192] * 5))
    with pytest.raises(ValueError, match="are not those of its network"):
        read_model(wide)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[:-100], lambda c: c[:20], lambda c: b"", lambda c: b"\xff" * 8 + c[8:],
     lambda c: (200_000).to_bytes(8, "little") + b"[" * 200_000],
)  # fmt: skip
def test_a_damaged_file_says_so(spoil):
    with pytest.raises(ValueError, match=r"damaged, or was cut off|no deepdem model file"):
        read_model(spoil(serialise(fitted().net)))


def test_weights_that_are_not_finite(tmp_path):
    model = fitted()
    with torch.no_grad():
        model.net.network.segmentation_head[0].weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"segmentation_head.0.weight'\] in .* not finite"):
        read_model(serialise(model.net))
    with pytest.raises(ValueError, match="training diverged, lower learning_rate"):
        model.save(tmp_path / "m.safetensors")


def test_a_network_of_one_s_own_takes_its_weights_back(scene, tmp_path):
    layers = ["dsm", "ortho_left", "ortho_right"]
    model = deepdem.DeepDEM(layers, network=Plain(), chip_size=32, dsm_scale=5.0).eval()
    names = model.spec.standardised
    model.net.spec = replace(
        model.spec, means=dict.fromkeys(names, 0.5), stds=dict.fromkeys(names, 0.2)
    )
    path = tmp_path / "own.safetensors"
    model.save(path)
    with pytest.raises(ValueError, match=r"of the user's own, 'test_models.Plain': build it"):
        deepdem.load_model(path)
    again = deepdem.load_model(path, network=Plain())
    assert all(p.requires_grad for p in again.parameters())
    part = scene.isel(x=slice(0, 64), y=slice(0, 64))
    refined = part.deepdem.refine(model).compute()
    np.testing.assert_array_equal(part.deepdem.refine(again).compute(), refined)
    with pytest.raises(ValueError, match="are not those of its network"):
        deepdem.load_model(path, network=torch.nn.Sequential(Plain()))
    fitted().save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="leave network= out"):
        deepdem.load_model(tmp_path / "m.safetensors", network=Plain())


class _Ramp(torch.nn.Module):
    """A network that keeps a number which no file holds."""

    def __init__(self, layers: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(layers, 1, 3, padding=1)
        self.register_buffer("twice", torch.ones(1) * 2, persistent=False)

    def forward(self, x):
        return self.conv(x) * self.twice


@pytest.mark.parametrize("half", [False, True])
def test_a_network_is_not_drawn_to_be_overwritten_unless_it_must(tmp_path, monkeypatch, half):
    """What is in no file is made as it always is; weights of another type are converted."""
    monkeypatch.setitem(
        deepdem.models.ARCHITECTURES, "ramp", lambda spec, weights: _Ramp(len(spec.layers))
    )
    for options in ({"architecture": "ramp"}, {"architecture": "resdepth"}):
        model = deepdem.DeepDEM(["dsm"], dsm_scale=5.0, chip_size=32, **options).eval()
        content = serialise(model.net.half() if half else model.net)
        net = read_model(content)
        x = torch.rand(1, len(net.spec.channels), 32, 32)
        assert next(net.parameters()).dtype == torch.float32
        torch.testing.assert_close(net(x), model.net.float()(x))
