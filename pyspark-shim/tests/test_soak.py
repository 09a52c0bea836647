"""Memory: what a runner holds after many runs is what it held after the first thousand."""

from __future__ import annotations

import psutil
import pyarrow as pa
import pytest
from figures import PROVE, count, report

ROWS, WIDTH = 2048, 512  # float32: 4 MiB a record batch
RUNS, SETTLED = count(400, 20_000), count(200, 1_000)
GROWTH_MB = 100


def resident_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


@pytest.mark.slow
def test_a_runner_does_not_grow(client, models):
    import numpy as np

    values = pa.array(np.random.default_rng(1).random(ROWS * WIDTH, dtype=np.float32))
    batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(values, WIDTH)})
    assert batch.nbytes == 4 << 20
    reference = f"file://{models}/mlp"
    # A table of many record batches, all the same memory, goes through one stream.
    per_call = min(SETTLED, 200)
    table = pa.Table.from_batches([batch] * per_call)
    before = None
    for done in range(0, RUNS, per_call):
        answer = client.predict(reference, table, inputs={"x": "x"})
        assert answer.num_rows == per_call * ROWS
        del answer
        if done + per_call == SETTLED:
            pid = _runner(client, models)
            before = resident_mb(pid)
    after = resident_mb(_runner(client, models))
    assert before is not None and _runner(client, models) == pid
    report(
        soak_runs=RUNS, soak_runs_wanted=20_000, rss_mb_after_first=round(before), rss_mb_at_end=round(after)
    )
    assert after - before < GROWTH_MB
    assert not PROVE or RUNS == 20_000


def _runner(client, models) -> int:
    return next(m["pid"] for m in client.status()["models"] if m["dir"] == f"{models}/mlp")
