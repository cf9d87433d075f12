"""Nodes that join and leave a Ray cluster in the middle of the work."""

from __future__ import annotations

import time

import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from ray.cluster_utils import Cluster  # noqa: E402

from tmpq_exp.config import ExecutorConfig  # noqa: E402
from tmpq_exp.elastic import Actors  # noqa: E402


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_leaves_is_done_without() -> None:
    class Placed:
        def build(self, _: None) -> None:
            self.node = ray.get_runtime_context().get_node_id()

        def where(self, number: int) -> tuple[int, str]:
            time.sleep(0.2)
            return number, self.node

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        actors = Actors(ray.remote(Placed).options(num_cpus=1), None, ExecutorConfig(name="ray"), "CPU", 1)
        done: list[tuple[int, str]] = []
        for index, (number, node) in actors.run("where", [(number,) for number in range(60)]):
            assert index == number
            done.append((number, node))
            if len(done) == 3:
                joined = nodes.add_node(num_cpus=1)
            if len(done) == 25:
                nodes.remove_node(joined, allow_graceful=False)
        assert sorted(number for number, _ in done) == list(range(60))
        assert len({node for _, node in done[:3]}) == 1
        assert len({node for _, node in done[:26]}) == 2
        assert len({node for _, node in done[-20:]}) == 1
    finally:
        ray.shutdown()
        nodes.shutdown()
