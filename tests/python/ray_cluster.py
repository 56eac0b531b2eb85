"""Runs a command on a Ray cluster of two nodes, one of which is killed in the middle: python ray_cluster.py WORK COMMAND...

The middle is when two parts in WORK have some results but not all.
"""

import os
import pathlib
import subprocess
import sys
import time

from ray.cluster_utils import Cluster

work, command = pathlib.Path(sys.argv[1]), sys.argv[2:]


def lines(path):
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines())


def under_way(results):
    part = results.with_name(results.name.replace(".results", ""))
    return 0 < lines(results) < lines(part)


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
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
