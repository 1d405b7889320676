"""Forced promotion: a place, or a majority, is lost with commits that nobody else has."""

import glob
import os
import subprocess
import time

import ZODB.FileStorage
import ZODB.POSException
from ZODB.utils import u64

import cluster as harness
import pytest
from places import Places
from test_blobs import blob_client, put, read
from test_cluster import Writer, check_files, transactions
from test_membership import wait_for_voters
from zeo_client import Client, make_database


def lost_files(node):
    return sorted(glob.glob(os.path.join(node.directory, "lost-*.fs")))


def take_down(nodes):
    for node in nodes:
        node.kill()


def wait_no_primary(node):
    def alone():
        picture = node.status()
        return picture and picture["primary"] is None

    harness.wait_for("no primary", alone)


def test_rows_7_13_20_21_a_place_is_lost_and_returns(nodes, tmp_path):
    """The first place has commits, with blobs, that never left it."""
    cluster = nodes.cluster(groups=["london"] * 3 + ["paris"] * 2, blobs=True).start()
    london, paris = cluster.nodes[:3], cluster.nodes[3:]
    clients = [
        blob_client(cluster.addresses, tmp_path / name, client=name, var=str(tmp_path))
        for name in ("one", "two")
    ]
    one, two = clients

    def first(root):
        root.update(both=0, changed="in both", london=0)
        put(root, "blob", b"in both")

    one.commit(first, note="both")
    cluster.wait_level()
    take_down(paris)
    for number in (1, 2, 3):
        one.commit(lambda root: root.update(changed="lost", london=number), note="lost %d" % number)
    one.commit(lambda root: put(root, "blob", b"lost"), note="lost 4")
    one.commit(lambda root: put(root, "another", b"lost too"), note="lost 5")
    # Both have it in their caches.
    two.sync()
    assert two.root["london"] == 3 and read(two.root, "blob") == b"lost"
    last = two.db.storage.lastTransaction()
    take_down(london)
    for node in paris:
        node.start()
    wait_no_primary(paris[0])

    # Nothing happens by itself, and not without a word that it is meant.
    time.sleep(3)
    assert paris[0].status()["primary"] is None
    assert "--force" in paris[0].ask("promote", "--group", "paris", fails=True)
    assert "no node of group rome" in paris[0].ask("promote", "--group", "rome", "--force", fails=True)
    assert "--yes" in paris[0].ask("promote", "--group", "paris", "--force", fails=True)
    printed = paris[0].ask("promote", "--group", "paris", "--force", "--yes")
    assert "primary, on timeline 2" in printed and "would be primary" in printed
    wait_for_voters(cluster, "n4", "n5")
    assert cluster.primary() in paris

    # The clients go on, with the truth.
    for client in clients:
        client.sync()
        root = client.root
        assert (root["changed"], root["london"]) == ("in both", 0)
        assert read(root, "blob") == b"in both" and "another" not in root
        assert client.db.storage.lastTransaction() > last
    one.commit(lambda root: root.update(paris=1))
    two.sync()
    assert two.root["paris"] == 1

    # The first place returns. It never serves, keeps what only it had, and follows.
    for node in london:
        node.start()
    cluster.failover = "paris"
    cluster.wait_healthy()
    assert cluster.status()["timeline"] == 2
    for node in london:
        assert "this node is primary" not in node.log().split("comes over")[-1]
        (path,) = lost_files(node)
        notes = [txn[3] for txn in transactions(path)]
        assert notes == [b"lost %d" % number for number in (1, 2, 3, 4, 5)]
        kept = ZODB.FileStorage.FileStorage(
            path, read_only=True, blob_dir=path.replace(".fs", ".blobs")
        )
        blobs = []
        for txn in kept.iterator():
            for record in txn:
                try:
                    with open(kept.loadBlob(record.oid, record.tid), "rb") as blob:
                        blobs.append(blob.read())
                except ZODB.POSException.POSKeyError:
                    pass
        kept.close()
        assert blobs == [b"lost", b"lost too"]
        shown = cluster.seen(node)["lost"]
        assert [tail["transactions"] for tail in shown] == [5]
    printed = paris[0].ask("lost", "list")
    assert all(node.name in printed for node in london) and "lost-1-" in printed
    assert "keeps 5 lost" in paris[0].ask("status")
    assert "timeline 2" in paris[0].ask("lineage", "show")

    # It gets the primary back when somebody says so.
    paris[0].ask("group", "move", "--to", "london")
    wait_for_voters(cluster, "n1", "n2", "n3")
    one.commit(lambda root: root.update(london=4))
    two.sync()
    assert (two.root["london"], two.root["paris"], read(two.root, "blob")) == (4, 1, b"in both")
    for client in clients:
        client.close()
    cluster.failover = "london"
    cluster.wait_level()
    check_files(cluster, [])
    out = tmp_path / "exported"
    subprocess.run([harness.STANDBY, "lost", "export", lost_files(london[0])[0], "--to", out], check=True)
    assert (out / "transactions.json").exists()
    assert [txn[3] for txn in transactions(glob.glob(str(out / "*.fs"))[0])][0] == b"lost 1"


def test_row_15_a_majority_is_lost_for_good(nodes):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.wait_level()
    survivor = next(node for node in cluster.nodes if node is not cluster.primary())
    refused = survivor.ask("recover-quorum", "--yes", fails=True)
    assert "is primary" in refused
    others = [node for node in cluster.nodes if node is not survivor]
    take_down(others)
    wait_no_primary(survivor)
    reader = Client([survivor.read_only_address], read_only=True)
    assert reader.root["number"] == 1
    assert "primary, on timeline 2" in survivor.ask("recover-quorum", "--yes")
    # A stock client goes on, and so does one that was reading.
    client.commit(lambda root: root.update(number=2))
    harness.wait_for("the reader", lambda: reader.sync() or reader.root["number"] == 2)
    # One of the lost comes back after all, and votes again.
    others[0].start()
    wait_for_voters(cluster, survivor.name, others[0].name)
    client.commit(lambda root: root.update(number=3))
    survivor.kill()
    survivor.start()
    client.commit(lambda root: root.update(number=4))
    others[1].start()
    cluster.wait_healthy()
    client.close()
    reader.close()
    cluster.wait_level()
    check_files(cluster, [])
