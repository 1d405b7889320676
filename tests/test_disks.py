"""Disks that fill up: small file systems in memory, as real as any. Needs root."""

import contextlib
import os
import shutil
import subprocess
import threading
import time

import pytest
from persistent import Persistent
from ZODB.blob import Blob
from ZODB.POSException import StorageError

import cluster as harness
from large import commit_many
from test_cluster import check_histories
from test_membership import new_node, stopping, wait_for_voters  # noqa: F401  (a fixture)
from zeo_client import Client, open_storage, transactions

MB = 1 << 20
RESERVE = "  reserve 32MB\n"


class Heavy(Persistent):
    """An object with some bytes."""

    def __init__(self, content):
        self.content = content


@contextlib.contextmanager
def small_disk(directory, megabytes=200, files=10_000):
    os.makedirs(directory, exist_ok=True)
    options = "size=%dm,nr_inodes=%d" % (megabytes, files)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "standby-test", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def disks(tmp_path):
    """Makes directories small disks."""
    with contextlib.ExitStack() as stack:
        yield lambda directory, **options: stack.enter_context(small_disk(str(directory), **options))


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


def fill_whole(directory):
    """A file that takes whatever is free, while others write; returns its path."""
    path = os.path.join(directory, "ballast")
    with open(path, "wb", buffering=0) as file:
        for piece in (8 * MB, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(piece)) == piece:
                    pass
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


def test_disks_of_all_nodes_fill_up_while_clients_commit(disks, nodes_on_disks):
    """Whoever is in the middle of something gets an answer, and somebody is primary who says why not."""
    cluster = nodes_on_disks.cluster(options=RESERVE)
    for node in cluster.nodes:
        disks(node.directory)
    cluster.configure()
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    answers = [[] for _ in range(3)]
    filled = threading.Event()

    def commit(mine):
        each = Client(cluster.addresses)
        while not (filled.is_set() and mine and "nearly full" in mine[-1]):
            try:
                each.commit(lambda root: root.update({"by %d" % id(mine): len(mine)}), attempts=1)
                mine.append("committed")
            except Exception as error:
                mine.append(str(error))
                each.manager.abort()
                time.sleep(0.1)
        each.close()

    threads = [threading.Thread(target=commit, args=(mine,), daemon=True) for mine in answers]
    for thread in threads:
        thread.start()
    harness.wait_for("commits", lambda: all(len(mine) > 10 for mine in answers))
    ballast = [fill(node.directory) for node in cluster.nodes]
    for node in cluster.nodes:
        wait_for_room(cluster, node, False)
    filled.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), [mine[-1] for mine in answers]
    # Somebody is primary; a switchover is refused, or given up, and does not stay half done.
    primary = cluster.primary()
    other = next(node for node in cluster.nodes if node is not primary)
    primary.ask("switchover", "--to", other.name, fails=True)
    assert cluster.primary() is primary
    assert all(node.process.poll() is None for node in cluster.nodes)
    for path in ballast:
        os.remove(path)
    client.commit(lambda root: root.update(x=1))
    cluster.wait_healthy()
    client.close()
    check_histories(cluster, [])


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


@pytest.mark.parametrize("count", [1, 3])
def test_disks_without_a_byte_left_end_no_node(disks, nodes_on_disks, count):
    """Somebody else takes the reserve too, in one moment and among commits: the node waits for room with what it has
    accepted, through checkpoints, refuses what comes, and goes on."""
    cluster = nodes_on_disks.cluster(options=RESERVE, count=count)
    for node in cluster.nodes:
        disks(node.directory)
    cluster.configure()
    cluster.start()
    acknowledged, stop = [], threading.Event()

    def write():
        client, number = Client(cluster.addresses), 0
        while not stop.is_set():
            number += 1
            try:
                text = os.urandom(50_000)
                client.commit(lambda root: root.update(x=number, text=text), note="w %d" % number, attempts=1)
                acknowledged.append(b"w %d" % number)
            except Exception:
                client.manager.abort()
                time.sleep(0.1)
        client.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    harness.wait_for("commits", lambda: len(acknowledged) > 20)
    ballast = [fill_whole(node.directory) for node in cluster.nodes]
    # Longer than from one checkpoint to the next.
    time.sleep(12)
    assert all(node.process.poll() is None for node in cluster.nodes)
    before = len(acknowledged)
    for path in ballast:
        os.remove(path)
    harness.wait_for("commits", lambda: len(acknowledged) > before + 20)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    check_histories(cluster, acknowledged)


def commit_some(client, count, first=0, size=200_000):
    """Revisions of one object: a pack removes all but the last."""
    notes = []
    for number in range(first, first + count):
        note = "w %d" % number
        client.commit(lambda root: root.update(x=number, text=os.urandom(size)), note=note)
        notes.append(note.encode())
    return notes


def test_row_50_a_pack_without_room_fails_alone(disks, nodes_on_disks):
    """On the primary, whose client hears of it, and on a replica: nothing ends, and all commits go on."""
    cluster = nodes_on_disks.cluster(options=RESERVE)
    first, second, third = cluster.nodes
    for node in (first, third):
        disks(node.directory)
    cluster.configure()
    cluster.start()
    cluster.make_primary(first)
    client = Client(cluster.addresses)
    notes = commit_some(client, 20)
    # What stays: a pack cannot make these smaller.
    for key in range(20):
        client.commit(lambda root: root.update({"big%d" % key: Heavy(os.urandom(1_000_000))}))
    ballasts = [fill(node.directory, left=40 * MB) for node in (first, third)]
    with pytest.raises(Exception) as refused:
        client.db.pack()
    text = str(refused.value)
    assert "a pack takes a second file of" in text and "are kept in reserve" in text, text
    notes += commit_some(client, 10, first=20, size=1000)
    for node in (first, third):
        harness.wait_for("the pack to fail", lambda: "the pack failed: " in node.log())
        assert node.process.poll() is None
        assert not os.path.exists(node.data_file + ".pack")
    harness.wait_for("the pack", lambda: " packed" in second.log())
    assert cluster.primary() is first
    # With room, the next one packs everywhere.
    for ballast in ballasts:
        os.remove(ballast)
    client.db.pack()
    harness.wait_for(
        "all to be small",
        lambda: max(os.path.getsize(node.data_file) for node in cluster.nodes) < 24 * MB,
    )
    notes += commit_some(client, 1, first=30, size=10)
    client.close()
    cluster.wait_level()
    assert not any("Fatal" in node.log() or "cannot apply" in node.log() for node in cluster.nodes)


def test_an_index_without_room_is_written_later(disks, nodes_on_disks):
    """It could be made anew from the data file: it does not take the reserve, which commits need."""
    cluster = nodes_on_disks.cluster(count=1, options=RESERVE)
    (node,) = cluster.nodes
    disks(node.directory, megabytes=400)
    cluster.configure()
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    index = os.path.join(node.state_dir, "1.index")
    refused = "the index takes a second file of"
    for number in range(3):
        # An index file of six megabytes.
        commit_many(node.address, range((1 + number) << 32, ((1 + number) << 32) + 400_000))
        before = os.path.exists(index) and os.path.getmtime(index)
        ballast = fill(node.directory, left=36 * MB)
        harness.wait_for(
            "a checkpoint", lambda: refused in node.log() or (os.path.exists(index) and os.path.getmtime(index) != before), 30
        )
        if refused in node.log():
            break
        # It was written just before the disk was full.
        os.remove(ballast)
    assert refused in node.log() and not os.path.exists(index + ".new")
    commit_some(client, 20, size=1000)
    assert not no_room(cluster, node)
    os.remove(ballast)
    client.commit(lambda root: root.update(x=1))
    harness.wait_for("the index", lambda: os.path.exists(index) and os.path.getsize(index) > 6 * MB, 30)
    client.close()


def test_without_room_for_more_files_another_node_is_primary(disks, nodes_on_disks):
    cluster = nodes_on_disks.cluster(options=RESERVE)
    first = cluster.nodes[0]
    disks(first.directory, files=400)
    cluster.configure()
    cluster.start()
    cluster.make_primary(first)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    many = os.path.join(first.directory, "many")
    os.mkdir(many)
    for number in range(os.statvfs(many).f_favail - 10):
        open(os.path.join(many, str(number)), "w").close()
    harness.wait_for("another primary", lambda: cluster.primary() is not first)
    client.commit(lambda root: root.update(x=1))
    assert first.process.poll() is None
    assert "inodes are free" in no_room(cluster, first)
    shutil.rmtree(many)
    wait_for_room(cluster, first, True)
    cluster.wait_level()
    client.close()
    check_histories(cluster, [])


def test_a_node_without_room_comes_back_to_a_primary_that_was_added_meanwhile(disks, stopping, tmp_path):
    """It has not heard that the other one is a member, nor where it is."""
    cluster = stopping(options=RESERVE)
    first = cluster.nodes[2]
    disks(first.directory)
    cluster.configure()
    cluster.start()
    primary = cluster.nodes[0]
    cluster.make_primary(primary)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0), note="before")
    cluster.wait_level()
    ballast = fill(first.directory)
    wait_for_room(cluster, first, False)
    added = new_node(cluster, tmp_path, "n4", primary.ask("node", "add", "n4"))
    added.start()
    wait_for_voters(cluster, "n1", "n2", "n3", "n4")
    cluster.make_primary(added)
    client.close()
    client = Client([added.address])
    client.commit(lambda root: root.update(x=1), note="after")
    os.remove(ballast)
    wait_for_room(cluster, first, True)
    cluster.wait_level()
    client.close()
    check_histories(cluster, [b"before", b"after"])


@pytest.mark.parametrize("nodes_of_it", [1, 3])
def test_a_data_file_that_somebody_removes_is_written_anew(nodes, nodes_of_it):
    """While clients commit, which lose nothing, and a pack follows."""
    if nodes_of_it == 1:
        primary = nodes.alone().start()
        addresses = [primary.address]
    else:
        cluster = nodes.cluster().start()
        primary, addresses = cluster.primary(), cluster.addresses
    client = Client(addresses)
    for number in range(50):
        client.commit(lambda root: root.update(x=number, heavy=Heavy("x" * 10_000)))
    os.remove(primary.data_file)
    deadline = time.monotonic() + 60
    while "is in its place again" not in primary.log():
        number += 1
        client.commit(lambda root: root.update(x=number))
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "somebody has removed" in primary.log()
    client.commit(lambda root: root.update(after=number))
    # As if the power had failed: what is in the file is what counts.
    primary.kill()
    history = transactions(primary.data_file)
    assert len(history) >= number
    primary.start()
    client.sync()
    assert client.root["after"] == number
    client.db.pack()
    # Another node may be primary now; each packs by itself.
    harness.wait_for("a pack", lambda: len(transactions(primary.data_file)) < 10)
    client.close()
    if nodes_of_it == 3:
        check_histories(cluster, [])
