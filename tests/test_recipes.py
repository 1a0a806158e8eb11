from __future__ import annotations

import numpy as np
import pytest
import torch

from deepdem.recipes import (
    LOSSES,
    ChipSample,
    averaged,
    fit_calibration,
    flat,
    moving_norms,
    recipe_of,
    settle,
    warm_cosine,
)  # fmt: skip


def _inputs(error):
    return torch.as_tensor(error), torch.ones(np.shape(error), dtype=torch.bool)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_grow_with_the_error(name):
    draw = torch.Generator().manual_seed(0)
    shape = torch.randn(2, 8, 8, generator=draw)
    usable, scale = torch.ones(2, 8, 8, dtype=torch.bool), torch.full((2, 8, 8), 0.5)
    losses = [float(LOSSES[name](size * shape, usable, scale)) for size in (0.0, 0.1, 1.0)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[0] == pytest.approx(0, abs=1e-6)  # of the Laplace's, log(2 * 0.5) is left


def test_the_weighted_laplace_loss_has_the_gradient_of_l1():
    error = torch.tensor([[[0.2, -3.0]]], requires_grad=True)
    scale = torch.tensor([[[0.1, 3.0]]], requires_grad=True)
    usable = torch.ones(1, 1, 2, dtype=torch.bool)
    LOSSES["beta_laplace"](error, usable, scale).backward()
    torch.testing.assert_close(error.grad, torch.tensor([[[0.5, -0.5]]]))
    # The scale is drawn to the error: too small in the first pixel, right in the second.
    assert scale.grad[0, 0, 0] < 0
    assert scale.grad[0, 0, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_is_not_usable_counts_as_nothing(name):
    """A loss over a chip and an empty one is that of the chip; of nothing it is 0, as is its
    gradient."""
    draw = torch.Generator().manual_seed(1)
    error = torch.randn(1, 8, 8, generator=draw)
    usable = torch.rand(1, 8, 8, generator=draw) < 0.7
    scale = torch.full((1, 8, 8), 0.7)
    error = torch.where(usable, error, 0.0)
    alone = LOSSES[name](error, usable, scale)
    both = LOSSES[name](
        torch.cat([error, torch.zeros_like(error)]), torch.cat([usable, usable & False]),
        torch.cat([scale, scale]),
    )  # fmt: skip
    assert both == pytest.approx(float(alone))
    left = torch.zeros(1, 8, 8, requires_grad=True)
    log_scale = torch.zeros(1, 8, 8, requires_grad=True)
    nothing = LOSSES[name](torch.where(usable & False, left, 0.0), usable & False, log_scale.exp())
    assert nothing == 0
    (nothing + 0 * left.sum() + 0 * log_scale.sum()).backward()
    assert (left.grad == 0).all()
    assert (log_scale.grad == 0).all()


def test_the_slope_of_the_error_counts():
    """Of two errors of equal size the rough one costs more, and a constant one adds nothing."""
    flat, usable = _inputs(np.ones((1, 6, 6), np.float32))
    rough = flat * torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0)
    assert LOSSES["l1_slope"](flat, usable, None) == LOSSES["l1"](flat, usable, None)
    assert float(LOSSES["l1_slope"](rough, usable, None)) == pytest.approx(1 + 0.5 * 2)
    hole = usable.clone()
    hole[0, :, 3] = False  # a step across a hole is none
    error = torch.where(torch.arange(6) < 3, 1.0, 2.0).expand(1, 6, 6)
    error = torch.where(hole, error, 0.0)
    assert LOSSES["l1_slope"](error, hole, None) == LOSSES["l1"](error, hole, None)


def test_the_laplace_loss_is_least_at_the_true_scale():
    draw = np.random.default_rng(0)
    error, usable = _inputs(draw.laplace(0, 0.3, (1, 100, 100)).astype(np.float32))
    loss = [float(LOSSES["laplace"](error, usable, torch.full_like(error, b))) for b in
            (0.2, 0.25, 0.3, 0.36, 0.45)]  # fmt: skip
    assert int(np.argmin(loss)) == 2


def test_schedule():
    values = [warm_cosine(p) for p in np.linspace(0, 1, 101)]
    assert values[0] < 0.05
    assert max(values) == pytest.approx(1)
    assert values[-1] == pytest.approx(0)


def test_a_flat_schedule_is_level_between_its_ends():
    values = [flat(p) for p in np.linspace(0, 1, 101)]
    assert values[0] < 0.05
    assert set(values[5:70]) == {1.0}
    assert values[85] == pytest.approx(0.5)
    assert values[-1] == 0


def test_the_average_forgets_its_beginning():
    step, average = averaged(0.99), torch.tensor([1000.0])
    for n in range(60):
        step([average], [torch.tensor([1.0])], torch.tensor(n))
    assert float(average) == pytest.approx(1, abs=0.05)
    average.zero_()
    step([average], [torch.tensor([1.0])], torch.tensor(10**6))
    assert float(average) == pytest.approx(0.01)


def test_settled_statistics_are_means_over_what_is_shown():
    draw = torch.Generator().manual_seed(0)
    shown = [3 + 2 * torch.randn(4, 2, 8, 8, generator=draw) for _ in range(5)]
    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(2, affine=False), torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(2)
    )
    network[2].eval()  # frozen
    first, last = network[0], network[2]
    norms = moving_norms(network)
    assert norms == [first]
    network.eval()
    settle(norms, network, shown)
    torch.testing.assert_close(first.running_mean, torch.stack(shown).mean((0, 1, 3, 4)))
    variances = [b.transpose(0, 1).flatten(1).var(dim=1) for b in shown]
    torch.testing.assert_close(first.running_var, torch.stack(variances).mean(0))
    assert (last.running_mean == 0).all()
    assert (last.running_var == 1).all()
    assert not first.training
    assert first.momentum == 0.1
    before = first.running_mean.clone()
    settle(norms, network, [])
    torch.testing.assert_close(first.running_mean, before)


def test_a_sample_of_chips_is_of_all_that_came():
    sample, many = ChipSample(), 2048
    for begin in range(0, many, 8):
        numbers = torch.arange(begin, begin + 8.0)
        sample.add(numbers[:, None, None, None].expand(8, 1, 256, 256))
    batches = list(sample.batches())
    assert [tuple(b.shape) for b in batches] == [(8, 1, 256, 256)] * 4
    seen = torch.cat(batches)[:, 0, 0, 0]
    assert len(seen.unique()) == 32
    # Of 32 drawn evenly the mean is off by 2048 / sqrt(12 * 32) = 104 or so.
    assert float(seen.mean()) == pytest.approx(many / 2, abs=300)
    few = ChipSample()
    assert list(few.batches()) == []
    few.add(torch.zeros(3, 2, 1024, 1024))
    assert [len(b) for b in few.batches()] == [3]


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_temperature_is_found(factor):
    draw = np.random.default_rng(0)
    ratio = torch.from_numpy(np.abs(draw.laplace(0, factor, 20_000)))
    found = fit_calibration(ratio)
    assert found.temperature == pytest.approx(factor, rel=0.03)
    for name, share in (("68", 0.68), ("95", 0.95)):
        assert found.inside[name] == pytest.approx(share, abs=0.01)
        laplace = -np.log(1 - share) / np.sqrt(2)
        assert found.intervals[name] == pytest.approx(laplace, rel=0.05)


def test_intervals_hold_what_they_say_whatever_the_shape():
    """Errors that are normal over their scales: no factor makes both Laplace intervals right."""
    draw = np.random.default_rng(0)
    ratio = torch.from_numpy(np.abs(draw.normal(0, 1.7, 20_000)))
    found = fit_calibration(ratio)
    std = np.sqrt(2) * found.temperature
    for name, share in (("68", 0.68), ("95", 0.95)):
        held = float((ratio <= found.intervals[name] * std).double().mean())
        assert held == pytest.approx(share, abs=1e-3)
    assert found.inside["68"] < 0.67


def test_presets():
    old = recipe_of("deepdem2024")
    assert (old.optimizer, old.learning_rate, old.schedule) == ("adam", 5e-4, "plateau")
    assert set(old.augment) == {"flip", "swap"}
    assert recipe_of("resdepth", learning_rate=1.0, loss=None).learning_rate == 1.0
    for wrong, match in (({"preset": "best"}, "preset='best'.*deepdem2024"),
                         ({"loss": "l3"}, "loss='l3'.*huber"), ({"ema": 1.0}, "ema=1.0"),
                         ({"schedule": "linear"}, "schedule='linear'"),
                         ({"learning_rate": 0.0}, "wanted more than 0")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            recipe_of(**{"preset": "default", **wrong})
