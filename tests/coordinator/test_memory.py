"""Memory of the whole process, in vectors of the model's length, compared with the docstrings."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedqueue.config.aggregation import FilterConfig
from fedqueue.config.loading import parse_config
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core.outliers import OutlierFilter

pytestmark = pytest.mark.slow  # seconds for each test: a model of 36 MB, and as many updates

LENGTH = 9_000_000  # 36 MB: malloc returns blocks above 32 MB as soon as they are freed
MANIFEST = Manifest((TensorSpec("w", "float32", (LENGTH,), 0, LENGTH, PARAMETER),))
K = 3


def resident() -> float:
    """Return the memory of this process, in vectors of float32 [LENGTH]."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (4 * LENGTH)


def configured(mode: Any, server: Any, **aggregation: Any) -> Any:
    tree = {"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}, "clients": {"count": 20}}
    aggregation = {"strategy": mode, "buffer_size": K, **aggregation}
    return parse_config({**tree, "aggregation": aggregation, "server_optimizer": server})


def robust(rule: Any) -> dict[str, Any]:
    return {"robust": {"rule": rule, "byzantine": 0}}


ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping")
MOMENTUM = {"name": "sgd", "optimizer_options": {"momentum": 0.9}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "aggregation", "server", "while_buffered", "afterwards"),
    [
        ("fedasync", {}, {}, 1, 1),  # the accumulator
        ("fedasync", {"mixing": "delta"}, {}, 1, 1),
        ("fedbuff", {}, {}, 1, 1),
        ("fedavg", {"cohort_size": K}, {}, 1, 1),
        ("fedbuff", {}, MOMENTUM, 2, 2),  # and the momentum
        ("fedbuff", {}, {"name": "adam", "learning_rate": 0.01}, 3, 3),  # and both moments
        ("fadas", {}, {}, 4, 4),  # and m, v, v̂
        (
            "ca2fl",
            {"strategy_options": {"cache_clients": 3}},
            {},
            1 + 1 + 3 + K,
            1 + 1 + 3,
        ),  # and h, the cache, the buffer
        *(("fedbuff", robust(rule), {}, 1 + K, 1) for rule in ROBUST),  # the accumulator and the buffer
    ],
    ids=str,
)
def test_aggregation_memory_matches_its_docstring(
    mode: Any, aggregation: Any, server: Any, while_buffered: Any, afterwards: Any
) -> None:
    settings = configured(mode, server, **aggregation)
    aggregator, model = make_aggregator(settings), Frame(MANIFEST)
    model.parameters.fill_(1.0)
    optimizer, held = ServerOptimizer(settings.server_optimizer, model), []
    before = resident()
    accumulator = aggregator.init(MANIFEST)
    for version in range(2):
        for i in range(settings.buffer_size):
            frame = Frame(MANIFEST)
            frame.parameters.fill_(float(version + i))
            aggregator.add(accumulator, Contribution(frame, 1, 0, client=f"client-{K * version + i}"), model)
            del frame
        held.append(resident() - before)
        optimizer.step(aggregator.finish(accumulator, model))
        accumulator.clear()
    assert held[-1] == pytest.approx(while_buffered, abs=0.6)
    assert resident() - before == pytest.approx(afterwards, abs=0.6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("bounds", "vectors"), [({"norm_factor": 3.0}, 0), ({"min_cosine": 0.0}, 2)], ids=str)
def test_filter_memory_matches_its_docstring(bounds: dict[str, Any], vectors: int) -> None:
    frame = Frame(MANIFEST)
    frame.parameters.fill_(1.0)
    before = resident()
    judging = OutlierFilter(FilterConfig(warmup=1, **bounds), LENGTH)
    for _ in range(2):
        judging.judge(frame.parameters, norm=3000.0)
        judging.admitted(frame.parameters, norm=3000.0)
        judging.committed(["client-0"])
    assert resident() - before == pytest.approx(vectors, abs=0.3)


WITHOUT_A_COMPILER = """
import subprocess
import sys
from fedqueue.config.loading import parse_config
from fedqueue_coordinator.algorithms.registry import check_algorithms
check_algorithms(parse_config({"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}}))
print("torch._dynamo" in sys.modules)
"""


def test_coordinator_with_default_settings_imports_no_compiler() -> None:
    """The compiler takes 70 MB and a second to import, and constructing any torch optimizer imports it."""
    told = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
