"""What clients are told of the cluster while they are connected, in ZEO's `info`: stock clients keep it."""

import time

import pytest
from persistent.mapping import PersistentMapping

import cluster as harness
from test_membership import new_node, stopping, wait_for_voters  # noqa: F401 (a fixture)
from zeo_client import Client, open_storage


def told(storage):
    """The cluster, as the server has told a stock client; by the names of nodes."""
    topology = storage._info.get("standby")
    return topology and {node["node"]: node for node in topology["nodes"]}


def primary_of(storage):
    topology = storage._info.get("standby")
    return topology and topology["primary"]


def text(address):
    return "%s:%s" % address


def test_a_client_learns_of_the_cluster_when_it_connects(nodes, encoding):
    cluster = nodes.cluster(zeo=encoding, groups=["here", "here", "witness", "far"]).start()
    storage = open_storage(cluster.addresses)
    topology = storage._info["standby"]
    assert (topology["version"], topology["cluster"], topology["timeline"]) == (1, "test", 1)
    assert topology["primary"] == cluster.primary().name
    # A witness serves no client.
    assert set(told(storage)) == {"n1", "n2", "n4"}
    for node in cluster.nodes[:2] + cluster.nodes[3:]:
        seen = told(storage)[node.name]
        assert seen["address"] == text(node.address)
        assert seen["read_only_address"] == text(node.read_only_address)
        assert seen["group"] == node.group
        assert seen["role"] == ("primary" if node is cluster.primary() else "replica")
    # It is an ordinary storage all the same.
    assert len(storage) == storage._info["length"] == 0
    storage.close()


def test_each_connected_client_hears_of_a_new_primary(nodes, encoding):
    cluster = nodes.cluster(zeo=encoding).start()
    writer = open_storage(cluster.addresses)
    reader = open_storage([cluster.nodes[2].read_only_address], read_only=True)
    cluster.make_primary(cluster.nodes[0])
    harness.wait_for("n1 is told", lambda: primary_of(writer) == primary_of(reader) == "n1")
    term = reader._info["standby"]["term"]
    cluster.nodes[0].ask("switchover", "--to", "n2")
    harness.wait_for("n2 is told", lambda: primary_of(writer) == primary_of(reader) == "n2")
    assert reader._info["standby"]["term"] > term
    cluster.named("n2").kill()
    harness.wait_for("another primary", lambda: primary_of(reader) in ("n1", "n3"))
    harness.wait_for("n2 is down", lambda: told(reader)["n2"]["state"] == "down")
    harness.wait_for("the writer is back", lambda: primary_of(writer) == primary_of(reader))
    writer.close()
    reader.close()


def test_a_connected_client_hears_of_nodes_that_come_and_go(stopping, tmp_path):  # noqa: F811
    cluster = stopping().start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1))
    storage = client.db.storage
    connection = storage._server.client.protocol if hasattr(storage._server, "client") else None
    printed = cluster.nodes[0].ask("node", "add", "n4")
    node = new_node(cluster, tmp_path, "n4", printed).start()
    wait_for_voters(cluster, "n1", "n2", "n3", "n4")
    harness.wait_for("n4 is told", lambda: "n4" in told(storage))
    assert told(storage)["n4"]["address"] == text(node.address)
    cluster.primary().ask("node", "remove", "n4")
    harness.wait_for("n4 is gone", lambda: "n4" not in told(storage))
    if connection is not None:
        assert storage._server.client.protocol is connection, "the client has connected anew"
    client.close()


def test_the_size_that_a_connected_client_knows_grows(nodes, encoding):
    """Without this `len(storage)` and `getSize()` stay what they were when the client connected."""
    cluster = nodes.cluster(zeo=encoding).start()
    reader = open_storage([cluster.nodes[1].read_only_address], read_only=True)
    idle = open_storage(cluster.addresses)
    before = [(len(storage), storage.getSize()) for storage in (reader, idle)]
    writer = Client(cluster.addresses)
    writer.commit(lambda root: root.update(x=PersistentMapping({"text": "x" * 10000})))
    after = (len(writer.db.storage), writer.db.storage.getSize())
    assert all(new > old for old, new in zip(before[0], after))
    for storage in (reader, idle):
        harness.wait_for("a fresh size", lambda: (len(storage), storage.getSize()) == after)
    for storage in (reader, idle, writer):
        storage.close()


def test_one_node_alone_tells_of_sizes_only(nodes):
    alone = nodes.alone().start()
    reader = open_storage([alone.address], read_only=True)
    assert "standby" not in reader._info
    writer = Client([alone.address])
    writer.commit(lambda root: root.update(x=PersistentMapping()))
    harness.wait_for("a fresh size", lambda: len(reader) == len(writer.db.storage))
    assert "standby" not in reader._info
    reader.close()
    writer.close()


def test_a_node_without_changes_says_nothing(nodes):
    """Idle clients are left in peace."""
    from test_alone import registered

    cluster = nodes.cluster().start()
    quiet = registered(cluster.nodes[1].read_only_address)
    quiet.settimeout(12)
    # What the start of the cluster has changed may still be on its way.
    time.sleep(2)
    drained = True
    quiet.setblocking(False)
    while drained:
        try:
            drained = quiet.recv(1 << 16)
        except BlockingIOError:
            break
    quiet.setblocking(True)
    quiet.settimeout(12)
    with pytest.raises(TimeoutError):
        quiet.recv(1)
    quiet.close()
