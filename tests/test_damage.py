"""Damaged data files: what a disk gives back is not what was written."""

import json
import os
import struct
import time

import pytest
import ZODB.FileStorage
from persistent.mapping import PersistentMapping

import cluster as harness
from faults import Faults
from test_blobs import content, files, put, read
from test_cluster import Writer, check_histories
from test_promotion import wait_no_primary
from zeo_client import Client, make_database

BLOCK = 16 << 10


def damage(path, at, length=8):
    """As a bad disk would: the bytes change, and nobody is told."""
    with open(path, "r+b") as file:
        file.seek(at)
        before = file.read(length)
        file.seek(at)
        file.write(bytes(byte ^ 0x55 for byte in before))


def sums(node):
    """How many blocks have checksums: they stand in groups."""
    try:
        with open(os.path.join(node.state_dir, "1.sums"), "rb") as file:
            groups = file.read()[8:]
    except FileNotFoundError:
        return 0
    blocks = 0
    while len(groups) >= 12:
        first, count = struct.unpack_from(">II", groups)
        assert first == blocks
        blocks += count
        groups = groups[12 + 4 * count :]
    return blocks


def wait_summed(nodes):
    """Until all blocks of all nodes' files have checksums; nobody is writing."""

    def summed():
        return all(sums(node) == os.path.getsize(node.data_file) // BLOCK for node in nodes)

    harness.wait_for("checksums", summed, timeout=40)


def fill(cluster_or_node, objects=2000):
    client = Client(cluster_or_node.addresses)

    def add(root):
        for number in range(objects):
            root["object %d" % number] = PersistentMapping(number=number, text="x" * 200)

    for number in range(3):
        client.commit(lambda root: root.update(round=number))
        client.commit(add)
    client.close()


def test_row_28_damage_is_mended_from_another_node(nodes):
    cluster = nodes.cluster().start()
    fill(cluster)
    wait_summed(cluster.nodes)
    victim = cluster.primary()
    intact = open(victim.data_file, "rb").read()
    victim.stop()
    # In every second block, records and their data among it.
    for at in range(100, len(intact) - BLOCK, 2 * BLOCK):
        damage(victim.data_file, at)
    assert open(victim.data_file, "rb").read() != intact
    victim.start()
    cluster.wait_healthy()
    # A reader gets data, not the error.
    reader = Client([victim.read_only_address], read_only=True)
    for number in range(2000):
        assert reader.root["object %d" % number]["number"] == number
    reader.close()
    # The scrub finds what nobody reads.
    harness.wait_for(
        "the file to be as it was",
        lambda: open(victim.data_file, "rb").read()[: len(intact)] == intact,
        timeout=60,
    )
    assert "damage is repaired from a node" in victim.log()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(after=1))
    client.close()
    check_histories(cluster, [])


def test_row_28_what_a_disk_cannot_read_is_mended_too(nodes, tmp_path):
    """As with a disk that has bad sectors: reads fail with EIO until the sectors are written."""
    faults = Faults(tmp_path)
    cluster = nodes.cluster().start()
    fill(cluster)
    wait_summed(cluster.nodes)
    victim = next(node for node in cluster.nodes if node is not cluster.primary())
    intact = open(victim.data_file, "rb").read()
    victim.stop()
    bad = range(5 * BLOCK, len(intact) - BLOCK, 7 * BLOCK)
    faults.set(*("read-error %d Data.fs" % (at + 4096) for at in bad))
    faults.hold(victim).start()
    cluster.wait_healthy()
    reader = Client([victim.read_only_address], read_only=True)
    for number in range(2000):
        assert reader.root["object %d" % number]["number"] == number
    reader.close()
    repaired = lambda: victim.log().count("damage is repaired from a node")  # noqa: E731
    # The scrub reads what nobody else does.
    harness.wait_for("all to be repaired", lambda: repaired() >= len(bad), timeout=60)
    assert len(bad) > 3 and cluster.seen(victim)["state"] == "up"
    check_histories(cluster, [])
    assert open(victim.data_file, "rb").read()[: len(intact)] == intact


def test_row_28_a_running_node_is_scrubbed(nodes):
    cluster = nodes.cluster(options="  scrub-rate 100MB\n").start()
    writer = Writer(cluster.addresses, "w")
    writer.wait_for_more()
    fill(cluster)
    victim = next(node for node in cluster.nodes if node is not cluster.primary())
    harness.wait_for("checksums", lambda: sums(victim) > 20, timeout=40)
    before = open(victim.data_file, "rb").read(20 * BLOCK)
    victim.stop()
    damage(victim.data_file, 3 * BLOCK)
    damage(victim.data_file, 15 * BLOCK - 4)
    victim.start()
    harness.wait_for(
        "the scrub", lambda: open(victim.data_file, "rb").read(20 * BLOCK) == before, timeout=30
    )
    writer.wait_for_more()
    cluster.wait_healthy()
    check_histories(cluster, writer.finish())


def test_row_28_a_damaged_node_neither_leads_nor_votes(nodes):
    """Nobody is there who has the bytes: a group that was packed at another time, say."""
    cluster = nodes.cluster(groups=["here", "here", "witness"], options="  scrub-rate 100MB\n").start()
    fill(cluster)
    wait_summed(cluster.nodes[:2])
    victim = cluster.nodes[0]
    cluster.make_primary(victim)
    (other,) = [node for node in cluster.nodes[:2] if node is not victim]
    victim.stop()
    other.stop()
    for node in (victim, other):
        damage(node.data_file, 5 * BLOCK + 10)
    # The checksums of the other one are gone: it takes them anew, of bytes that differ from the victim's.
    os.remove(os.path.join(other.state_dir, "1.sums"))
    victim.start()
    other.start()
    cluster.failover = "here"
    harness.wait_for(
        "the damage to be seen",
        lambda: (other.status() or {}).get("nodes")
        and cluster.seen(victim, other)["state"] == "damaged",
        timeout=30,
    )
    assert "at byte %d" % (5 * BLOCK) in other.ask("status")
    harness.wait_for("another primary", lambda: other.status()["primary"] == other.name, timeout=30)
    other.kill()
    time.sleep(4)
    assert victim.status()["primary"] is None, "it does not stand for election"
    other.start()
    harness.wait_for(
        "the other one", lambda: other.status() and other.status()["primary"] == other.name
    )


def blob_name(number):
    return "blob %d" % number


def blob_files(node):
    """Its blobs, with what is in them."""
    return dict(sorted(files(node.blob_dir).items()))


def damage_blobs(node, faults=None):
    """One in each way that there is; returns which."""
    names = list(blob_files(node))
    paths = [os.path.join(node.blob_dir, name) for name in names]
    os.chmod(paths[0], 0o600)
    damage(paths[0], 2000)
    os.chmod(paths[1], 0o600)
    os.truncate(paths[1], 70)
    os.remove(paths[2])
    if faults is not None:
        faults.set("read-error 4096 " + names[3])
    return names[: 3 if faults is None else 4]


def repaired_blobs(node):
    return node.log().count("a damaged blob is repaired from a node")


@pytest.mark.parametrize("reader", ["client", "scrub"])
def test_row_28_damaged_blobs_are_mended_from_another_node(nodes, tmp_path, reader):
    faults = Faults(tmp_path / "machine")
    rate = "100MB" if reader == "scrub" else "0"
    cluster = nodes.cluster(options="  scrub-rate %s\n" % rate, blobs=True).start()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "writer"))
    contents = {blob_name(number): content(number, 20_000) for number in range(6)}
    client.commit(lambda root: [put(root, name, data) for name, data in contents.items()])
    client.close()
    cluster.wait_level()
    victim = next(node for node in cluster.nodes if node is not cluster.primary())
    intact = blob_files(victim)
    victim.stop()
    # The shim knows bad sectors by the file's name only: a client would find that of a repaired blob bad again.
    damaged = damage_blobs(victim, faults if reader == "scrub" else None)
    faults.hold(victim).start()
    cluster.wait_healthy()
    if reader == "client":
        client = Client(
            [victim.read_only_address], read_only=True, blob_dir=str(tmp_path / "reader")
        )
        assert {name: read(client.root, name) for name in contents} == contents
        client.close()
    harness.wait_for("the blobs", lambda: repaired_blobs(victim) >= len(damaged), timeout=60)
    assert len(damaged) == repaired_blobs(victim) == (4 if reader == "scrub" else 3)
    assert blob_files(victim) == intact
    assert cluster.seen(victim)["state"] == "up"
    check_histories(cluster, [])


def test_row_28_a_damaged_blob_does_not_spread(nodes, tmp_path):
    """A new node gets its blobs from one on which they are damaged."""
    cluster = nodes.cluster(options="  scrub-rate 0\n", blobs=True).start()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "writer"))
    for number in range(3):
        name = blob_name(number)
        client.commit(lambda root: put(root, name, content(number, 20_000)))
    client.close()
    cluster.wait_level()
    primary = cluster.primary()
    late = next(node for node in cluster.nodes if node is not primary)
    intact = blob_files(primary)
    late.stop()
    for path in (late.data_file, late.state_dir, late.blob_dir):
        os.rename(path, path + ".aside")
    damaged = damage_blobs(primary)
    late.start()
    harness.wait_for("the blobs", lambda: blob_files(late) == intact, timeout=60)
    cluster.wait_healthy()
    harness.wait_for("the others", lambda: repaired_blobs(primary) >= len(damaged))
    assert blob_files(primary) == intact


def test_row_28_a_blob_that_nobody_has_is_told(nodes, tmp_path):
    node = nodes.alone(blobs=True)
    make_database(node.data_file, 10)
    node.start()
    client = Client(node.address, blob_dir=str(tmp_path / "writer"))
    client.commit(lambda root: put(root, "blob", content(1, 20_000)))
    client.close()
    node.stop()
    (name,) = blob_files(node)
    path = os.path.join(node.blob_dir, name)
    os.chmod(path, 0o600)
    damage(path, 50)
    node.start()
    client = Client(node.address, blob_dir=str(tmp_path / "reader"))
    with pytest.raises(Exception, match="it is damaged") as raised:
        read(client.root, "blob")
    assert "other node" not in str(raised.value)
    harness.wait_for("a line in the log", lambda: "this blob is damaged or missing" in node.log())
    # From a backup, say.
    damage(path, 50)
    harness.wait_for("the scrub", lambda: "all damaged blobs are repaired" in node.log())
    client.db.cacheMinimize()
    assert read(client.root, "blob") == content(1, 20_000)
    client.close()


def test_row_28_a_blob_that_no_node_has_stops_nothing_else(nodes, tmp_path):
    cluster = nodes.cluster(
        groups=["here", "here", "witness"], options="  scrub-rate 100MB\n", blobs=True
    ).start()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "writer"))
    client.commit(lambda root: put(root, "blob", content(1, 20_000)))
    client.close()
    cluster.wait_level()
    with_data = cluster.nodes[:2]
    paths = []
    for node in with_data:
        node.stop()
        (name,) = blob_files(node)
        paths.append(os.path.join(node.blob_dir, name))
        os.chmod(paths[-1], 0o600)
        damage(paths[-1], 50)
    for node in with_data:
        node.start()
    for node in with_data:
        told = "this blob is damaged or missing"
        harness.wait_for("the damage to be told", lambda: told in node.log())
    cluster.primary()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "reader"))
    client.commit(lambda root: root.update(number=1))
    with pytest.raises(Exception, match="it is damaged, and no other node"):
        read(client.root, "blob")
    assert {cluster.seen(node)["state"] for node in with_data} == {"damaged"}
    # They do not ask each other again and again.
    for node in with_data:
        assert node.log().count("cannot get a damaged blob") < 20
    # One gets it back from a backup, and the other one from there.
    damage(paths[0], 50)
    for node in with_data:
        healed = "all damaged blobs are repaired"
        harness.wait_for("the blob", lambda: healed in node.log(), timeout=60)
    client.db.cacheMinimize()
    assert read(client.root, "blob") == content(1, 20_000)
    client.close()
    cluster.wait_healthy()
    check_histories(cluster, [])


def damage_log(node):
    """In the middle of what the node wrote last."""
    directory = os.path.join(node.state_dir, "log")
    for name in sorted(os.listdir(directory), reverse=True):
        path = os.path.join(directory, name)
        used = len(open(path, "rb").read().rstrip(b"\0"))
        if used > 4096:
            damage(path, used // 2)
            return
    raise AssertionError("the log is empty")


def wait_checkpointed(node, voters):
    """Until its checkpoint knows the cluster as it is now: a new cluster has had none yet."""

    def known():
        with open(os.path.join(node.state_dir, "checkpoint")) as file:
            checkpoint, _ = json.JSONDecoder().raw_decode(file.read())
        return len(checkpoint["voters"]) == voters

    harness.wait_for("a checkpoint", known, timeout=60)


@pytest.mark.parametrize("role", ["replica", "primary"])
def test_row_28_a_node_whose_log_is_damaged_joins_anew(nodes, role):
    cluster = nodes.cluster().start()
    fill(cluster)
    writers = [Writer(cluster.addresses, "w%d" % number) for number in range(2)]
    for writer in writers:
        writer.wait_for_more()
    primary = cluster.primary()
    victim = next(node for node in cluster.nodes if (node is primary) == (role == "primary"))
    others = [node for node in cluster.nodes if node is not victim]
    wait_checkpointed(victim, voters=3)
    victim.kill()
    damage_log(victim)
    for writer in writers:
        writer.wait_for_more()
    victim.start()
    # What others know of it may be from before.
    harness.wait_for(
        "its vote",
        lambda: "voters=3" in victim.log().partition("The log is put aside")[2],
        timeout=60,
    )
    cluster.wait_healthy()
    assert "the log is damaged" in victim.log()
    assert os.listdir(os.path.join(victim.state_dir, "log.damaged-1"))
    # It votes again: without one of the others the cluster goes on.
    others[0].kill()
    for writer in writers:
        writer.wait_for_more()
    others[0].start()
    cluster.wait_healthy()
    check_histories(cluster, [pair for writer in writers for pair in writer.finish()])


def test_row_28_a_damaged_log_that_the_others_need_is_left_to_a_person(nodes):
    cluster = nodes.cluster(groups=["here", "here"]).start()
    fill(cluster)
    victim = cluster.nodes[1]
    wait_checkpointed(victim, voters=2)
    victim.kill()
    damage_log(victim)
    assert victim.start().wait() != 0
    said = victim.log()
    assert "the log is damaged" in said and "recover-quorum" in said, said
    # As it says.
    wait_no_primary(cluster.nodes[0])
    cluster.nodes[0].ask("recover-quorum", "--yes")
    harness.wait_for("a primary", lambda: cluster.nodes[0].status()["primary"] == "n1")
    for path in (victim.state_dir, victim.data_file):
        os.rename(path, str(path) + ".aside")
    victim.start()
    cluster.wait_healthy()
    check_histories(cluster, [])


@pytest.mark.parametrize("what", ["checkpoint", "data"])
def test_row_28_what_a_start_needs_and_cannot_read_is_left_to_a_person(nodes, tmp_path, what):
    faults = Faults(tmp_path / "machine")
    cluster = nodes.cluster().start()
    fill(cluster)
    writer = Writer(cluster.addresses, "w")
    writer.wait_for_more()
    victim = next(node for node in cluster.nodes if node is not cluster.primary())
    faults.hold(victim)
    victim.stop()
    if what == "checkpoint":
        damage(os.path.join(victim.state_dir, "checkpoint"), 30)
    else:
        # The end of the file, for which there is no checksum yet.
        faults.set("read-error %d Data.fs" % (os.path.getsize(victim.data_file) - 1000))
    assert victim.start().wait() != 0
    said = victim.log()
    assert what == "data" or "state/checkpoint is damaged: " in said, said
    assert "move %s and the data files away, keep them, and start again" % victim.state_dir in said
    # As it says.
    faults.set()
    for path in (victim.state_dir, victim.data_file):
        os.rename(path, path + ".aside")
    victim.start()
    cluster.wait_healthy()
    writer.wait_for_more()
    check_histories(cluster, writer.finish())


def test_row_28_one_node_alone_says_what_to_do(nodes):
    node = nodes.alone()
    make_database(node.data_file, 10)
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root.update(number=1))
    client.close()
    node.stop()
    state_dir = node.data_file + ".standby"
    damage(os.path.join(state_dir, "checkpoint"), 30)
    assert node.start().wait() != 0
    assert "move %s away and start again" % state_dir in node.log(), node.log()
    os.rename(state_dir, state_dir + ".aside")
    node.start()
    client = Client(node.address)
    assert client.root["number"] == 1
    client.close()


def test_one_node_alone_gives_an_error_and_no_wrong_data(nodes):
    node = nodes.alone()
    make_database(node.data_file, 3000)
    node.start()
    node.addresses = [node.address]
    node.state_dir = node.data_file + ".standby"
    fill(node)
    wait_summed([node])
    node.stop()
    oid = oid_of(node.data_file, "object 77")
    at = [record.pos for record in positions(node.data_file) if record.oid == oid][-1]
    damage(node.data_file, at + 60)
    node.start()
    client = Client(node.addresses)
    root = client.root
    assert root["round"] == 2
    try:
        root["object 77"]["text"]
    except Exception as error:
        assert "not what was written" in str(error), error
    else:
        raise AssertionError("damaged data were given out")
    client.close()


def positions(path):
    storage = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    try:
        return [record for txn in storage.iterator() for record in txn]
    finally:
        storage.close()


def oid_of(path, key):
    storage = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    db = ZODB.DB(storage)
    try:
        with db.transaction() as connection:
            return connection.root()[key]._p_oid
    finally:
        db.close()


def test_replicas_are_compared_with_the_primary(nodes):
    cluster = nodes.cluster(options="  scrub-rate 100MB\n").start()
    fill(cluster)
    wait_summed(cluster.nodes)
    primary = cluster.primary()
    victim, other = [node for node in cluster.nodes if node is not primary]
    victim.stop()
    oid = oid_of(victim.data_file, "object 77")
    record = [record for record in positions(victim.data_file) if record.oid == oid][-1]
    damage(victim.data_file, record.pos + 60)
    # As if it had been written so: there is no checksum that says otherwise.
    os.remove(os.path.join(victim.state_dir, "1.sums"))
    victim.start()
    cluster.wait_healthy()
    harness.wait_for("the difference", lambda: cluster.seen(victim).get("differs"), timeout=30)
    assert cluster.seen(victim)["differs"] == {"1": record.tid.hex()}
    assert "differs in storage 1" in primary.ask("status")
    assert "differs" not in cluster.seen(other)
