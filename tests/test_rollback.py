"""A node's disk is put back to an earlier state: row 46."""

import os
import shutil

import pytest

import cluster as harness
from test_cluster import check_histories
from test_founding import shown
from zeo_client import Client


def keep(node, directory):
    """A snapshot of a machine that is off."""
    shutil.copytree(node.directory, directory)


def put_back(node, directory):
    log = node.log()
    shutil.rmtree(node.directory)
    shutil.copytree(directory, node.directory)
    with open(node.log_path, "w") as file:
        file.write(log)


def identity(node):
    with open(os.path.join(node.state_dir, "identity")) as file:
        return file.read()


@pytest.mark.parametrize("leader", ["the same primary", "another primary", "all restarted"])
def test_row_46_a_restored_snapshot_is_noticed(nodes, tmp_path, leader):
    cluster = nodes.cluster().start()
    first, second, third = cluster.nodes
    cluster.make_primary(first)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(n=0), "before")
    cluster.wait_level()
    third.stop()
    keep(third, tmp_path / "snapshot")
    third.start()
    cluster.wait_healthy()
    # With the third node alone: it is one of the two that have acknowledged it.
    second.stop()
    notes = [b"before"]
    for number in range(50):
        client.commit(lambda root: root.update(n=number), "after %d" % number)
        notes.append(b"after %d" % number)
    cluster.primary()
    if leader == "all restarted":
        # A checkpoint tells what was acknowledged.
        first.stop()
    third.kill()
    put_back(third, tmp_path / "snapshot")
    former = identity(third)
    if leader == "all restarted":
        first.start()
    third.start()
    harness.wait_for("it to be noticed", lambda: "its disk was put back to an earlier state" in third.log())
    if leader == "another primary":
        # It must not vote for the one that lacks what it has forgotten.
        first.kill()
        second.start()
        harness.wait_for("a node that is there", lambda: shown(second))
        assert second.status()["primary"] is None
        first.start()
    else:
        second.start()
    cluster.wait_healthy()
    assert identity(third) != former
    assert not any("panicked" in node.log() for node in cluster.nodes)
    client.commit(lambda root: root.update(n=100), "at last")
    client.close()
    check_histories(cluster, notes + [b"at last"])
