"""Networks made fast for inference give what they gave."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from test_models import _batch, _spec

from deepdem.convolution import NarrowConv, WinogradConv
from deepdem.inference import UpsampledConv, exact, for_inference
from deepdem.models import ResidualNet
from deepdem.predict import Prediction, predict


def _normalised(net):
    """Return the network, its batch normalisations as training leaves them."""
    draw = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.2), (module.running_var, 0.6),
                (module.weight.data, 0.7), (module.bias.data, -0.2),
            ):  # fmt: skip
                tensor.uniform_(low, low + 0.5, generator=draw)
    return net.eval()


@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_050"])
def test_what_is_made_for_inference_gives_the_same(encoder):
    spec = _spec(architecture="unet", encoder=encoder, options={}, chip_size=64)
    net = _normalised(ResidualNet(spec))
    x = torch.cat([_batch()] * 2, dim=-1).repeat(1, 1, 2, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.inference_mode():
        exact, fast = net(x), for_inference(net)(x)
        rough = for_inference(net, bf16=True)(x)
    assert exact.std() > 1e-3
    torch.testing.assert_close(fast, exact, atol=1e-3 * float(exact.std()), rtol=0)
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # not changed


def test_batch_normalisation_is_folded_and_bf16_weights_are_kept_where_it_is_safe():
    net = _normalised(ResidualNet(_spec()))
    fast = for_inference(net, bf16=True)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
    assert fast.weights_dtype == torch.bfloat16

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 1, 3, padding=1), torch.nn.BatchNorm2d(1)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    own = _normalised(ResidualNet(_spec(), Twice()))
    kept = for_inference(own, bf16=True)
    assert kept.bf16
    assert kept.weights_dtype == torch.float32  # autocast: a normalisation is among the weights
    torch.testing.assert_close(for_inference(own)(_batch()), own(_batch()))


def _draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _conv(inputs, outputs, *, bias=True):
    conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(7))
    return conv


@torch.inference_mode()
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8)])
def test_upsampling_and_convolution_are_one(skip, shape):
    conv = _conv(5 + skip, 4)
    x = _draw(3, 2, 5, *shape)
    beside = _draw(4, 2, skip, 2 * shape[0], 2 * shape[1]) if skip else None
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    exact = conv(large if beside is None else torch.cat([large, beside], dim=1))
    torch.testing.assert_close(UpsampledConv(conv, 5)(x, beside), exact, atol=1e-5, rtol=0)


def test_what_is_rewritten_and_where():
    def made(**keywords):
        net = ResidualNet(_spec(architecture="unet", encoder="resnet18", chip_size=64, options={}))
        return for_inference(_normalised(net), **keywords)

    def count(net, kind):
        return sum(isinstance(module, kind) for module in net.modules())

    fast = made()
    assert count(fast, UpsampledConv) == 5
    # 4 + 3 + 3 + 3 in the encoder; in the decoder 5 after 5, 4 of skip connections, and what is
    # upsampled of no more than 64 channels.
    assert count(fast, WinogradConv) == 13 + 5 + 4 + 2
    assert count(fast, NarrowConv) == 1
    # Those after the first convolution, which strides, and the first ones of three stages.
    assert sum(type(module) is torch.nn.ReLU for module in fast.modules()) == 4
    rough = made(bf16=True)
    assert count(rough, UpsampledConv) == count(rough, WinogradConv) == 0
    attentive = for_inference(
        ResidualNet(
            _spec(
                architecture="unet", encoder="resnet18", chip_size=64,
                options={"decoder_attention_type": "scse"},
            )
        ).eval()
    )  # fmt: skip
    assert count(attentive, UpsampledConv) == 0  # it looks at what is concatenated


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_what_is_compiled_gives_the_same():
    net = _normalised(ResidualNet(_spec(options={"start_kernel": 2, "depth": 1})))
    with torch.inference_mode():
        fast = for_inference(net, compiled=True)
        torch.testing.assert_close(fast(_batch()), net(_batch()), atol=1e-4, rtol=0)
    assert fast.network._compiled_call_impl is not None


# --- what float32 is ------------------------------------------------------------------------------


def _now():
    cudnn = torch.backends.cudnn
    said = (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    said += (torch.get_float32_matmul_precision(),)
    if hasattr(torch.backends.cudnn, "conv"):
        said += (torch.backends.cudnn.conv.fp32_precision,)
    return said


def test_matrix_products_of_bf16_that_a_user_allowed_are_not_ours():
    """A transformer's products are off by 2 % of its output; convolutions here are not asked."""
    net = ResidualNet(_spec(architecture="segformer", encoder="mit_b0", options={})).eval()
    x = torch.cat([_batch()] * 2, dim=-1).repeat(1, 1, 2, 1)
    fast = for_inference(net)
    wanted, _ = predict([fast], x, Prediction())
    torch.set_float32_matmul_precision("medium")
    try:
        # Rewritten with the setting as well: it is checked on a probe.
        given = [predict([one], x, Prediction())[0] for one in (fast, for_inference(net))]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(one, wanted) for one in given)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_settings_are_put_back_by_the_last_thread_that_needs_them(allowed):
    torch.set_float32_matmul_precision(allowed)
    torch.backends.cudnn.benchmark = allowed == "high"  # as Trainer(benchmark=True) does
    before, come, leave = _now(), threading.Event(), threading.Event()

    def other():
        with exact():
            come.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        with exact():
            within = _now()
            assert within[:4] == (False, True, False, "highest")
            assert "tf32" not in within
            thread.start()
            come.wait(10)
        assert _now() == within  # the other is still within
        leave.set()
        thread.join()
        assert _now() == before
        with pytest.raises(RuntimeError, match="its own"), exact():
            raise RuntimeError("its own")
        assert _now() == before
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
