from __future__ import annotations

import numpy as np
import pytest
import torch

from deepdem.monitor import ErrorStatistics, picture


def test_statistics_in_batches_are_those_of_all():
    draw = np.random.default_rng(0)
    error = torch.from_numpy(draw.laplace(0.3, 1.0, (6, 50, 50)).astype(np.float32))
    usable = torch.from_numpy(draw.random((6, 50, 50)) < 0.8)
    one, two = ErrorStatistics(), ErrorStatistics()
    one.add(error[:2], usable[:2], 1.0)
    two.add(error[2:], usable[2:], 1.0)
    two.add(error, usable & False, float("nan"))  # a batch without a pixel
    one.merge(two)
    known = error[usable].double().numpy()
    metrics = one.metrics()
    assert metrics["val_MAE"] == pytest.approx(np.abs(known).mean(), rel=1e-5)
    assert metrics["val_RMSE"] == pytest.approx(np.sqrt(np.square(known).mean()), rel=1e-5)
    assert metrics["val_bias"] == pytest.approx(known.mean(), rel=1e-4)
    nmad = 1.4826 * np.median(np.abs(known - np.median(known)))
    assert metrics["val_NMAD"] == pytest.approx(nmad, rel=0.01)
    assert metrics["val_loss"] == pytest.approx(1.0)
    assert ErrorStatistics().metrics() == {}


def test_medians_are_of_a_bounded_sample():
    seen = ErrorStatistics()
    for _ in range(3):
        seen.add(torch.randn(1, 512, 512), torch.ones(1, 512, 512, dtype=torch.bool), 0.0)
    assert seen.count == 3 * 512**2
    assert sum(map(len, seen.errors)) <= 3 * 2**14
    assert seen.metrics()["val_NMAD"] == pytest.approx(1, abs=0.02)


def test_the_picture_shows_where_it_is_wrong():
    y, x = np.mgrid[:32, :32].astype(np.float32)
    truth = 5 * np.sin(x / 5) + 0.2 * y
    dsm = truth + np.where(x < 16, 2, -2).astype(np.float32)
    dsm[:4] = np.nan
    row = picture(dsm, truth.copy(), truth, 1.0)
    assert row.shape == (32, 5 * 32 + 4 * 4, 3)
    assert row.min() >= 0
    assert row.max() <= 1
    before, after = row[:, 3 * 36 : 3 * 36 + 32], row[:, 4 * 36 : 4 * 36 + 32]
    assert (before[8, 4] == [1, before[8, 4, 1], before[8, 4, 2]]).all()
    assert before[8, 4, 2] < 0.8  # too high: red
    assert before[8, 28, 0] < 0.8  # too low: blue
    np.testing.assert_array_equal(after[4:], 1)
    np.testing.assert_array_equal(before[0], 0.5)
