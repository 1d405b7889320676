"""A cluster of an older version: what a node of this one does in it, and after the level is raised."""

import contextlib
import json
import socket
import threading

import cluster as harness
from test_standby_zodb import Follower
from zeo_client import Client


def crc32c(data):
    """Castagnoli's checksum, as the checkpoint file has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def as_before_there_were_settings(node):
    """Leaves the node's checkpoint as the version before wrote it."""
    path = node.state_dir + "/checkpoint"
    with open(path, "rb") as file:
        content, checksum = file.read().rsplit(b"\n", 2)[:2]
    assert int(checksum, 16) == crc32c(content)
    checkpoint = json.loads(content)
    del checkpoint["settings"]
    for member in checkpoint["members"]:
        del member["witness"]
    content = json.dumps(checkpoint).encode()
    with open(path, "wb") as file:
        file.write(content + b"\n%08x\n" % crc32c(content))


def test_rows_36_and_37_an_upgraded_node_follows_and_leads_at_the_old_level(nodes):
    cluster = nodes.cluster().start()
    cluster.stop()
    for node in cluster.nodes:
        as_before_there_were_settings(node)
    cluster.start()
    n1 = cluster.nodes[0]
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    assert n1.ask("feature-level", "show").strip() == "1"
    refused = n1.ask("node", "add", "n4", fails=True)
    assert "works at feature level 1" in refused and "feature-level raise" in refused
    # Transactions have no tokens yet.
    follower = Follower(cluster.addresses)
    follower.commit(lambda root: root.update(follows=1))
    assert not follower.storage.topology.tokens and follower.storage._token is None
    # What changes nothing in the log works: followers are upgraded first, the primary last.
    before = cluster.primary()
    n1.ask("switchover")
    assert cluster.primary() is not before
    before.stop()
    client.commit(lambda root: root.update(number=2))
    before.start()
    cluster.wait_healthy()
    # All of them know more: it may be used.
    assert "the feature level is 4" in n1.ask("feature-level", "raise")
    assert "already" in n1.ask("feature-level", "raise")
    n1.ask("node", "add", "n4")
    harness.wait_for("tokens", lambda: follower.storage.topology.tokens)
    follower.commit(lambda root: root.update(follows=2))
    assert follower.storage._token is not None
    follower.close()
    # What was so by itself is said now.
    harness.wait_for("the group", lambda: cluster.status()["failover_groups"] == ["here"])
    # It is so after a restart of all.
    cluster.stop()
    cluster.start()
    assert n1.ask("feature-level", "show").strip() == "4"
    client.commit(lambda root: root.update(number=3))


def begins_unsealed(node):
    """What a node answers whoever begins without encryption, as nodes of older versions do."""
    hello = dict(
        protocol=1, purpose="probe", cluster="test", cluster_id="", id="f", node="n9", group="here", peer_address="", nonce="00"
    )
    content = b"h" + json.dumps(hello).encode()
    with socket.create_connection((node.host, node.peer_port), 10) as sock:
        sock.sendall(len(content).to_bytes(4, "big") + content)
        return sock.recv(1 << 16)[4:5]


def test_connections_are_sealed_when_all_nodes_can_do_it(nodes):
    """Until then nodes of older versions are understood. A new node understands none, whatever it knows of its cluster."""
    cluster = nodes.cluster(secret=True)
    answers, joined = [], threading.Event()

    def ask():
        while not joined.is_set():
            for node in cluster.nodes:
                with contextlib.suppress(OSError):
                    answers.append(begins_unsealed(node))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    cluster.start()
    joined.set()
    asking.join(30)
    assert not asking.is_alive() and set(answers) <= {b"x", b""} and b"x" in answers, set(answers)
    n1 = cluster.nodes[0]
    cluster.stop()
    for node in cluster.nodes:
        as_before_there_were_settings(node)
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    assert begins_unsealed(n1) == b"h"
    n1.ask("feature-level", "raise")
    for node in cluster.nodes:
        harness.wait_for("the level", lambda: begins_unsealed(node) == b"x")
    cluster.wait_healthy()
    client.commit(lambda root: root.update(number=2))
    n1.ask("switchover", "--to", "n2" if cluster.primary() is not cluster.nodes[1] else "n3")
    client.commit(lambda root: root.update(number=3))
    client.close()
