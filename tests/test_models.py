from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fitted

import deepdem
from deepdem.models import ModelSpec, ResidualNet, build_network


def _spec(**change):
    spec = ModelSpec(
        ("dsm", "ortho_left", "valid"), architecture="resdepth", chip_size=32, dsm_scale=4.0,
        means={"ortho_left": 0.5}, stds={"ortho_left": 0.25},
        options={"start_kernel": 4, "depth": 2},
    )  # fmt: skip
    return replace(spec, **change)


def _batch(n=2, height=2000.0):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, 3, 32, 32)).astype(np.float32)
    x[:, 0] = height + 3 * x[:, 0]
    x[:, 1] = 0.5 + 0.2 * x[:, 1]
    x[:, 2] = 1
    return torch.from_numpy(x)


def test_what_the_network_sees():
    x = _batch()
    x[0, 0, :4] = torch.nan
    x[1, 1, 5, 5] = torch.nan
    x[1, 2, 5, 5] = 0
    before = x.clone()
    z = ResidualNet(_spec()).standardise(x)
    assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(before))  # not changed
    dsm = before[0, 0].double().numpy()
    wanted = np.nan_to_num((dsm - np.nanmean(dsm)) / 4.0)
    np.testing.assert_allclose(z[0, 0], wanted, atol=1e-5)
    np.testing.assert_allclose(z[0, 1], (before[0, 1] - 0.5) / 0.25, atol=1e-5)
    assert z[1, 1, 5, 5] == 0  # the mean
    far = before.clone()
    far[0, 1, 0, 0] = 1e6
    assert ResidualNet(_spec()).standardise(far)[0, 1, 0, 0] == 10
    assert z[1, 2, 5, 5] == 0
    assert z[1, 2].sum() == 32 * 32 - 1
    assert torch.isfinite(z).all()


def test_an_empty_chip_and_a_high_plateau():
    net = ResidualNet(_spec())
    x = _batch()
    x[0, 0] = torch.nan
    assert (net.standardise(x)[0, 0] == 0).all()
    low, high = (net.standardise(_batch(height=h)) for h in (0.0, 4000.0))
    np.testing.assert_allclose(low, high, atol=2e-4)  # 4000 m in float32 have steps of 0.2 mm


def test_heights_do_not_depend_on_their_level():
    net = ResidualNet(_spec()).eval()
    with torch.no_grad():
        np.testing.assert_allclose(net(_batch(height=0.0)), net(_batch(height=1500.0)), atol=1e-3)


def test_local_centring_takes_the_level_that_it_is_given():
    net = ResidualNet(_spec(centering="local")).eval()
    assert net.spec.channels == ("dsm", "ortho_left", "valid", "dsm_level")
    x = _batch(height=1500.0)
    level = torch.full_like(x[:, :1], 1490.0)
    z = net.standardise(torch.cat([x, level], dim=1))
    assert z.shape == x.shape
    wanted = torch.nan_to_num((x[:, 0] - 1490.0) / net.spec.dsm_scale)
    np.testing.assert_allclose(z[:, 0], wanted, atol=1e-6)
    np.testing.assert_array_equal(z[:, 1:], ResidualNet(_spec()).standardise(x)[:, 1:])
    with pytest.raises(ValueError, match=r"3 channels, wanted .*'dsm_level'"):
        net(x)


@pytest.mark.parametrize(
    ("options", "reach"), [({"depth": 2}, 11), ({"depth": 3}, 23), ({"depth": 4}, 47)]
)
def test_a_pixel_is_felt_as_far_as_was_measured_and_no_further(options, reach):
    net = ResidualNet(_spec(options={"start_kernel": 4, **options}, centering="local"))
    assert net.training
    net.eval()
    assert net.spec.reach_px == reach
    x = torch.randn(1, 3, 256, 256)
    other = x.clone()
    other[..., 128:160, 128:160] = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        felt = (net.network(other) != net.network(x))[0].any(dim=0).nonzero()
    # 128 and 160 are the block's edges; convolutions of random weights hold nothing back.
    assert felt.min() == 128 - reach
    assert felt.max() == 159 + reach


@pytest.mark.parametrize(
    ("change", "match"),
    [({"centering": "sun"}, "'chip' or 'local'"),
     ({"layers": ("ortho_left",)}, "lack 'dsm'"), ({"layers": ("dsm", "dsm")}, "twice"),
     ({"layers": ("dsm", "lidar_dsm")}, "hold the truth"),
     ({"target": "ndvi"}, "wanted 'lidar_dsm'"),
     ({"chip_size": 100}, "multiple of 32")],
)  # fmt: skip
def test_a_wrong_spec_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        _spec(**change)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"encoder='resnet999'.*nearest are resnet"):
        build_network(_spec(architecture="unet", encoder="resnet999", options={}))
    with pytest.raises(ValueError, match="encoder='tu-nothing'"):
        build_network(_spec(architecture="unet", encoder="tu-nothing", options={}))
    with pytest.raises(ValueError, match=r"architecture='wnet' is not known.*resdepth.*unet"):
        build_network(_spec(architecture="wnet"))
    for architecture in ("resdepth", "unet"):
        with pytest.raises(ValueError, match=r"options=.*colour.* do not fit"):
            build_network(_spec(architecture=architecture, options={"colour": 1}))
    with pytest.raises(ValueError, match="is no name of a network"):
        _spec(encoder="tu-hf-hub:someone/something")
    with pytest.raises(ValueError, match="has none"):
        build_network(_spec(), "imagenet")


@pytest.mark.parametrize("architecture", ["unet", "fpn", "deeplabv3plus"])
def test_any_architecture_of_smp(architecture):
    net = ResidualNet(_spec(architecture=architecture, chip_size=64, options={})).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 64)


def test_resdepth_has_resdepth_s_parameters():
    """The published names and shapes: a checkpoint of ResDepth fits without renaming."""
    net = build_network(
        _spec(options={"start_kernel": 8, "depth": 4, "max_filter_depth": 64, "do_bn": True})
    )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["encoder.0.0.0.weight"] == (8, 3, 3, 3)
    assert "encoder.0.0.0.bias" not in shapes
    assert shapes["bottleneck.0.weight"] == (64, 64, 3, 3)
    assert shapes["decoder.0.0.weight"] == (64, 64, 2, 2)
    assert shapes["decoder.0.1.0.weight"] == (32, 64, 3, 3)
    assert shapes["decoder.3.weight"] == (8, 8, 2, 2)
    assert shapes["last_layer.weight"] == (1, 8, 3, 3)


def test_resdepth_fits_its_checkpoint(data_folder):
    state = torch.load(data_folder / "compat/Model_best.pth", weights_only=True)
    net = build_network(
        _spec(options={"start_kernel": 8, "depth": 4, "max_filter_depth": 64, "do_bn": True})
    )
    net.load_state_dict(state["model_state_dict"])


class Plain(torch.nn.Module):
    """A user's own network, defined nowhere but here."""

    def __init__(self, layers=3, outputs=1):
        super().__init__()
        self.conv = torch.nn.Conv2d(layers, outputs, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_a_network_of_one_s_own_is_looked_at():
    model = deepdem.DeepDEM(["dsm", "ortho_left", "valid"], network=Plain(), chip_size=32)
    assert (model.spec.architecture, model.spec.encoder) == ("own", "test_models.Plain")
    with pytest.raises(ValueError, match="does not take a batch"):
        deepdem.DeepDEM(["dsm", "valid"], network=Plain(), chip_size=32)
    with pytest.raises(ValueError, match=r"gives \(2, 1, 32, 32\).*wanted \(2, 2, 32, 32\)"):
        deepdem.DeepDEM(
            ["dsm", "ortho_left", "valid"], network=Plain(), chip_size=32, uncertainty=True
        )


@pytest.mark.parametrize(
    "encoder", ["resnet34", "tu-convnext_atto", "tu-efficientnet_b0", "mit_b0", "mobilenet_v2"]
)
def test_any_encoder_of_smp_and_timm(encoder):
    net = ResidualNet(_spec(architecture="unet", encoder=encoder, chip_size=64, options={})).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 64)


@pytest.mark.parametrize("views", [0, 1, 4])
def test_any_number_of_views(views):
    layers = ("dsm", *(f"ortho_{n + 1}" for n in range(views)))
    model = fitted(layers, target="lidar_dtm")
    with torch.no_grad():
        assert model(torch.zeros(1, 1 + views, 64, 64)).shape == (1, 64, 64)


def test_heights_are_float32_under_a_trainer_s_autocast():
    """Convolutions follow the surrounding autocast; heights and residuals never do."""
    net = ResidualNet(_spec()).eval()
    seen = []
    net.network.register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        residual, _ = net.moments(_batch(height=4000.0))
    assert seen == [(torch.float32, torch.bfloat16)]
    assert residual.dtype == torch.float32
    with torch.no_grad():
        np.testing.assert_allclose(residual, net(_batch(height=4000.0)), atol=0.2)
