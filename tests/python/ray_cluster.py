"""Runs a command on a Ray cluster of two nodes, one of which is killed in the middle: python ray_cluster.py WORK COMMAND...

The middle is when two parts in WORK have some results but not all.
"""

import os
import pathlib
import subprocess
import sys
import time

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it asks for nothing outside of this machine

from ray.cluster_utils import Cluster

work, command = pathlib.Path(sys.argv[1]), sys.argv[2:]


def lines(path):
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines())


def under_way(results):
    part = results.with_name(results.name.replace(".results", ""))
    return 0 < lines(results) < lines(part)


NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}
# That a node is dead is noticed sooner than by default.
HEALTH_CHECKS = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}

cluster = Cluster(True, head_node_args={**NODE, "include_dashboard": False, "_system_config": HEALTH_CHECKS})
second = cluster.add_node(**NODE)
cluster.wait_for_nodes()
try:
    run = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})
    while sum(map(under_way, work.glob("*.results.jsonl"))) < 2:
        assert run.poll() is None, "it has ended before both nodes worked"
        time.sleep(0.01)
    cluster.remove_node(second, allow_graceful=False)
    print("killed a node", flush=True)
    status = run.wait(120)
finally:
    cluster.shutdown()
sys.exit(status)
