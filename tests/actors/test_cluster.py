"""Places on clusters of several nodes, with logical CPUs and GPUs: each in a process of its own, since this one has its
own cluster."""

import os
import subprocess
import sys
import tempfile
import textwrap

HEAD = """
import ray, json, threading, time
from ray.cluster_utils import Cluster
from autoprune.actors.placement import Layout, reserve
from autoprune.models.errors import InputError

def cluster(*nodes):
    made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=nodes[0][0], num_gpus=nodes[0][1],
                   include_dashboard=False))
    for cpus, gpus in nodes[1:]:
        made.add_node(num_cpus=cpus, num_gpus=gpus)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    return made

class Where:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"]

def where(row, count, resources):
    actor = ray.remote(Where)
    reserved = dict(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    made = [actor.options(**reserved, scheduling_strategy=row.strategy(p)).remote() for p in range(count)]
    return ray.get([one.where.remote() for one in made])
"""


def run(body: str) -> str:
    script = HEAD + textwrap.dedent(body) + "\nray.shutdown()\nmade.shutdown()\n"
    # Short, since sockets lie in it, and apart, so that nobody else finds this cluster.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"RAY_TMPDIR": folder}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_shards_of_a_replica_are_neighbours_on_whole_gpus():
    """Two nodes of two GPUs, two replicas of two shards; then one that needs both nodes, whose row does not go to and
    fro. An engine on the CPU of a full cluster needs no place."""
    run("""
    made = cluster((4, 0), (0, 2), (0, 2))
    said = []
    layout = Layout(shards=2, replicas=2, threads=1, engines=0, gpus_per_shard=1)
    places = reserve(layout, 90.0, said.append)
    assert places.evaluator.num_gpus == 1 and places.evaluator.device == "cuda" and not places.engines
    found = [where(row, 2, places.evaluator) for row in places.replicas]
    for row in found:
        assert len({node for node, _ in row}) == 1 and len({tuple(gpus) for _, gpus in row}) == 2, found
    assert found[0][0][0] != found[1][0][0]
    places.free()
    places = reserve(Layout(3, 1, 1, 1, 1, 1, 1), 90.0, said.append)
    nodes = [node for node, _ in where(places.replicas[0], 3, places.evaluator)]
    assert nodes[1] == nodes[0] or nodes[1] == nodes[2], nodes
    assert len(places.engines) == 1 and where(places.engines[0], 1, places.engine)[0][1]
    places.free()
    """)


def test_a_search_waits_for_nodes_and_says_what_is_missing():
    out = run("""
    made = cluster((2, 1))
    said = []
    layout = Layout(shards=2, replicas=2, threads=1, engines=1, gpus_per_shard=0.5, gpus_per_engine=1)
    try:
        reserve(layout, 1.0, said.append)
        raise AssertionError("there was room")
    except InputError as error:
        print(error)
    assert said and "no place for" in said[0], said
    found = []
    waiting = threading.Thread(target=lambda: found.append(reserve(layout, 90.0, said.append)), daemon=True)
    waiting.start()
    time.sleep(1)
    assert not found
    made.add_node(num_gpus=2)
    waiting.join()
    print("placed", len(found))
    assert ray.cluster_resources()["GPU"] == 3
    """)
    assert "did not become large enough within 1 s" in out and "1 nodes have 2 CPUs, 1 GPUs" in out
    assert "placed 1" in out


def test_without_gpus_every_machine_has_room():
    run("""
    made = cluster((2, 0))
    places = reserve(Layout(shards=2, replicas=3, threads=1), 90.0, print)
    assert places.engines == [None] and places.evaluator.num_cpus == 0.33 and places.evaluator.device == "cpu"
    assert len({node for row in places.replicas for node, _ in where(row, 2, places.evaluator)}) == 1
    """)


def test_shares_are_worked_out_anew_when_a_node_turns_out_to_be_gone():
    """Ray counts the resources of a node that fell silent for some seconds: those who start meanwhile would ask for
    what nobody has."""
    run("""
    made = cluster((1, 0), (1, 0))
    made.remove_node(made.list_all_nodes()[1], allow_graceful=False)
    assert ray.cluster_resources()["CPU"] == 2, "Ray has noticed at once, and this test tests nothing"
    places = reserve(Layout(shards=2, replicas=1, threads=1), 90.0, print)
    assert places.evaluator.num_cpus == 0.5, places.evaluator
    assert len(where(places.replicas[0], 2, places.evaluator)) == 2
    """)


def test_by_default_all_actors_have_equal_shares_of_the_gpus():
    run("""
    made = cluster((2, 4))
    for layout, share in ((Layout(2, 1, 1), 1.0), (Layout(2, 3, 1), 0.5)):
        places = reserve(layout, 90.0, print)
        assert places.engine.num_gpus == places.evaluator.num_gpus == share, places
        places.free()
    """)
