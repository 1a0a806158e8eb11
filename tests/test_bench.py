"""That the benchmarks run; what they measure is for a quiet machine to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "ci" / "bench"
SCRIPTS = sorted(p.name for p in BENCH.glob("*.py") if p.name != "common.py")


# Those that take seconds; the others train networks or start clusters for minutes.
QUICK = {"coregistration.py", "cuda_speed.py", "graph.py", "seams.py", "zarr_size.py"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs(script: str, tmp_path: Path) -> None:
    options = ["--small", "--cache", str(tmp_path)] if script in QUICK else ["--help"]
    run = subprocess.run(  # noqa: S603  # our own words
        [sys.executable, str(BENCH / script), *options],
        env={**os.environ, "DEEPDEM_DATA": str(tmp_path / "none")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert ("| ---" if script in QUICK else "usage") in run.stdout
