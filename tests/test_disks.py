"""Disks that fill up: small file systems in memory, as real as any. Needs root."""

import contextlib
import os
import subprocess
import threading

import pytest
from ZODB.blob import Blob
from ZODB.POSException import StorageError

import cluster as harness
from test_cluster import check_histories
from zeo_client import Client, open_storage

MB = 1 << 20
RESERVE = "  reserve 32MB\n"


@contextlib.contextmanager
def small_disk(directory, megabytes=200):
    os.makedirs(directory, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=%dm" % megabytes, "standby-test", directory], check=True
    )
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def disks(tmp_path):
    """Makes directories small disks."""
    with contextlib.ExitStack() as stack:
        yield lambda directory: stack.enter_context(small_disk(str(directory)))


@pytest.fixture
def nodes_on_disks(disks, nodes):
    """Nodes that end before their disks go."""
    return nodes


def fill(directory, left=8 * MB):
    """A file that takes all but so many bytes; returns its path."""
    found = os.statvfs(directory)
    path = os.path.join(directory, "ballast")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - left)
    return path


def no_room(cluster, node):
    return cluster.seen(node).get("no_room")


def wait_for_room(cluster, node, room):
    harness.wait_for("a disk", lambda: bool(no_room(cluster, node)) != room)


def test_row_24_a_primary_without_room_lets_another_one_be_it(disks, nodes_on_disks):
    cluster = nodes_on_disks.cluster(options=RESERVE)
    first = cluster.nodes[0]
    disks(first.directory)
    cluster.configure()
    cluster.start()
    cluster.make_primary(first)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0), note="w 0")
    ballast = fill(first.directory)
    acknowledged = [b"w 0"]
    deadline = 200
    while cluster.primary() is first:
        number = len(acknowledged)
        client.commit(lambda root: root.update(x=number), note="w %d" % number)
        acknowledged.append(b"w %d" % number)
        deadline -= 1
        assert deadline
    assert "is nearly full" in first.log()
    assert "disk nearly full" in cluster.nodes[1].ask("status")
    harness.wait_for(
        "a refusal",
        lambda: "the disk of n1 is nearly full"
        in cluster.nodes[1].ask("switchover", "--to", first.name, fails=True),
    )
    client.commit(lambda root: root.update(x=1), note="elsewhere")
    acknowledged.append(b"elsewhere")
    # It serves what it has, and resumes by itself.
    storage = open_storage(first.read_only_address, read_only=True, server_sync=False)
    assert len(storage) > 0
    storage.close()
    os.remove(ballast)
    wait_for_room(cluster, first, True)
    cluster.wait_level()
    assert "there is room on the disk again" in first.log()
    client.close()
    check_histories(cluster, acknowledged)


def test_row_25_a_replica_without_room_stops_taking_entries(disks, nodes_on_disks):
    cluster = nodes_on_disks.cluster(options=RESERVE)
    last = cluster.nodes[2]
    disks(last.directory)
    cluster.configure()
    cluster.start()
    cluster.make_primary(cluster.nodes[0])
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0), note="w 0")
    cluster.wait_level()
    ballast = fill(last.directory)
    wait_for_room(cluster, last, False)
    acknowledged = [b"w 0"]
    # More than would fit into what is left.
    for number in range(1, 30):
        client.commit(lambda root: root.update(x=number, text=os.urandom(500_000)), note="w %d" % number)
        acknowledged.append(b"w %d" % number)
    assert last.process.poll() is None
    reader = Client(last.read_only_address, read_only=True, server_sync=False)
    assert reader.root["x"] < 29
    reader.close()
    assert len({n["last_tid"]["1"] for n in cluster.status()["nodes"]}) == 2
    os.remove(ballast)
    wait_for_room(cluster, last, True)
    cluster.wait_level()
    client.close()
    check_histories(cluster, acknowledged)


def test_without_a_majority_with_room_commits_are_refused(disks, nodes_on_disks):
    cluster = nodes_on_disks.cluster(options=RESERVE)
    full = cluster.nodes[1:]
    for node in full:
        disks(node.directory)
    cluster.configure()
    cluster.start()
    cluster.make_primary(cluster.nodes[0])
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    ballast = [fill(node.directory) for node in full]
    for node in full:
        wait_for_room(cluster, node, False)
    with pytest.raises(Exception, match="the disks of n2, n3 are nearly full"):
        client.commit(lambda root: root.update(x=1), attempts=1)
    client.manager.abort()
    for path in ballast:
        os.remove(path)
    client.commit(lambda root: root.update(x=2))
    client.close()


def test_a_node_alone_refuses_and_goes_on(disks, nodes_on_disks, tmp_path):
    node = nodes_on_disks.alone(blobs=True)
    disks(node.directory)
    node.configure("")
    node.start()
    client = Client(node.address, blob_dir=str(tmp_path / "cache"))
    client.commit(lambda root: root.update(x=0))
    ballast = fill(node.directory)
    harness.wait_for("a full disk", lambda: "is nearly full" in node.log())
    # Objects, blobs, many at once: refused, with the reason; nothing is written.
    free = os.statvfs(node.directory).f_bavail
    for change in (
        lambda root: root.update(x=1),
        lambda root: root.update(text=os.urandom(20 * MB)),
        lambda root: root.update(blob=Blob(os.urandom(20 * MB))),
    ):
        with pytest.raises(Exception, match=r"disk of node alone is nearly full: \d+ MB are free"):
            client.commit(change, attempts=1)
        client.manager.abort()
    assert client.root["x"] == 0
    assert os.statvfs(node.directory).f_bavail == free
    os.remove(ballast)
    client.commit(lambda root: root.update(x=2, blob=Blob(b"fits")))
    assert client.root["blob"].open("r").read() == b"fits"
    # While commits go on, the disk fills up: what is acknowledged is there.
    stop = threading.Event()
    acknowledged = []

    def write():
        while not stop.is_set():
            try:
                number = len(acknowledged)
                client.commit(lambda root: root.update(x=number), attempts=1)
                acknowledged.append(number)
            except StorageError:
                client.manager.abort()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    harness.wait_for("commits", lambda: len(acknowledged) > 100)
    ballast = fill(node.directory)
    harness.wait_for("a full disk", lambda: node.log().count("nothing is committed on it") == 2)
    os.remove(ballast)
    before = len(acknowledged)
    harness.wait_for("commits", lambda: len(acknowledged) > before + 10)
    stop.set()
    thread.join()
    client.close()
    assert node.stop() == 0
    node.start()
    client = Client(node.address)
    assert client.root["x"] == acknowledged[-1]
    client.close()
    node.stop()
