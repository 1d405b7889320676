"""Packs: on one node and on three, beside commits, cut short by kills."""

import os
import random
import threading
import time

import pytest
from persistent.mapping import PersistentMapping
from persistent.TimeStamp import TimeStamp
from ZEO.ClientStorage import ClientStorage
from ZODB.Connection import TransactionMetaData
from ZODB.utils import maxtid, z64

import cluster as harness
import records
from test_blobs import blob_client, files, put, read
from zeo_client import Client, make_database, transactions


def grow_and_drop(client, rounds=5):
    """Makes revisions and garbage."""
    for number in range(rounds):

        def change(root):
            root["kept"] = root.get("kept") or PersistentMapping()
            root["kept"]["number"] = number
            root["dropped"] = PersistentMapping(data="x" * 50_000)

        client.commit(change)
    client.commit(lambda root: root.pop("dropped"))


def check_packed(path, most):
    """The file is small, opens in Python, and every object in it can be loaded."""
    assert os.path.getsize(path) < most
    history = transactions(path)
    assert {txn[1] for txn in history} <= {"p", " "}
    return history


def test_one_node_packs(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    client = Client(node.address)
    grow_and_drop(client)
    before = os.path.getsize(node.data_file)
    client.db.pack()
    assert os.path.getsize(node.data_file) < before / 5
    assert os.path.getsize(node.data_file + ".old") == before
    client.commit(lambda root: root["kept"].update(after=1))
    client.sync()
    assert client.root["kept"]["number"] == 4
    # Killed before it has written another checkpoint than the one of the pack.
    node.kill()
    check_packed(node.data_file, before / 5)
    node.start()
    client.sync()
    assert dict(client.root["kept"]) == {"number": 4, "after": 1}
    client.close()


def test_options_of_a_pack(nodes):
    node = nodes.alone()
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        options = "  pack-gc false\n  pack-keep-old no\n</filestorage>"
        config.write(text.replace("</filestorage>", options))
    node.start()
    client = Client(node.address)
    grow_and_drop(client)
    client.db.pack()
    assert not os.path.exists(node.data_file + ".old")
    # Without garbage collection, the dropped objects stay, in one revision each.
    assert os.path.getsize(node.data_file) > 5 * 50_000
    assert "gc=false" in node.log()
    client.close()


def test_all_nodes_of_a_cluster_pack_beside_commits(nodes):
    cluster = nodes.cluster()
    make_database(cluster.nodes[0].data_file, 3000)
    cluster.start()
    client = Client(cluster.addresses)
    grow_and_drop(client, 20)
    stop, acknowledged, slowest = threading.Event(), [], [0.0]

    def write():
        writer = Client(cluster.addresses)
        while not stop.is_set():
            note = "note %d" % len(acknowledged)
            began = time.monotonic()
            writer.commit(lambda root: root.update(note=note), note=note)
            slowest[0] = max(slowest[0], time.monotonic() - began)
            acknowledged.append(note.encode())
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        # Its clock is ahead of the nodes': what is committed meanwhile is not packed, anywhere.
        client.db.pack(time.time() + 60)
        for node in cluster.nodes:
            harness.wait_for("a pack of %s" % node.name, lambda: " packed storage" in node.log())
    finally:
        stop.set()
        thread.join()
    print("slowest commit beside a pack: %.3f s" % slowest[0])
    cluster.wait_level()
    client.close()
    cluster.stop()
    histories = [check_packed(node.data_file, 3_000_000) for node in cluster.nodes]
    assert histories[0] == histories[1] == histories[2]
    notes = [txn[3] for txn in histories[0]]
    # Notes of packed transactions stay only if something of them is left.
    packed = {txn[3] for txn in histories[0] if txn[1] == "p"}
    late = [note for note in acknowledged if note in notes and note not in packed]
    assert late == acknowledged[-len(late) :] and late
    assert acknowledged[-1] not in packed


def test_a_node_that_was_down_during_a_pack_catches_up(nodes):
    """Its last transaction is one that the others have packed away."""
    cluster = nodes.cluster(options="  log-tail 1KB\n").start()
    client = Client(cluster.addresses)
    grow_and_drop(client)
    client.commit(lambda root: root.update(garbage=PersistentMapping()), note="packed away")
    cluster.wait_level()
    replica = next(node for node in cluster.nodes if node is not cluster.primary())
    replica.stop()
    assert transactions(replica.data_file)[-1][3] == b"packed away"
    client.commit(lambda root: root.pop("garbage"))
    client.commit(lambda root: root.update(x=1))
    current = client.db.storage.lastTransaction()
    client.db.pack()
    # Until a checkpoint has moved the beginning of the log beyond what the replica lacks.
    for number in range(240):
        client.commit(lambda root: root.update(x=number))
        time.sleep(0.1)
    survivors = [node for node in cluster.nodes if node is not replica]
    for node in survivors:
        assert b"packed away" not in [txn[3] for txn in transactions(node.data_file)]
    replica.start()
    cluster.wait_level()
    assert "caught up" in replica.log().split("stopped")[-1]
    reader = Client(replica.read_only_address, read_only=True)
    assert reader.root["x"] == 239 and reader.root["kept"]["number"] == 4
    # What was there just before is packed away on the others, and never came; what the replica has is older.
    assert reader.db.storage.loadBefore(z64, current) is None
    reader.close()
    client.close()


def test_a_node_that_was_down_lacks_a_blob_that_was_packed_away(nodes, tmp_path):
    """The log that it has missed names a blob that nobody has any more."""
    cluster = nodes.cluster(blobs=True).start()
    client = blob_client(cluster.addresses, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", b"first"))
    cluster.wait_level()
    replica = next(node for node in cluster.nodes if node is not cluster.primary())
    replica.kill()
    client.commit(lambda root: put(root, "blob", b"second"))
    client.commit(lambda root: put(root, "blob", b"third"))
    client.db.pack()
    client.commit(lambda root: root.update(x=1))
    survivors = [node for node in cluster.nodes if node is not replica]
    for node in survivors:
        harness.wait_for("packed blobs", lambda: list(files(node.blob_dir).values()) == [b"third"])
    replica.start()
    cluster.wait_level()
    assert "was packed away: catching up instead" in replica.log()
    reader = blob_client(replica.read_only_address, tmp_path / "reader", read_only=True)
    assert reader.root["x"] == 1 and read(reader.root, "blob") == b"third"
    reader.close()
    client.close()


def test_row_34_a_pack_that_is_cut_short_begins_again(nodes):
    node = nodes.alone()
    make_database(node.data_file, 5000)
    node.start()
    client = Client(node.address)
    begun_before = 0
    for round_ in range(12):
        grow_and_drop(client, 3)
        client.commit(lambda root: root["kept"].update(round=round_), note="round %d" % round_)
        size = os.path.getsize(node.data_file)
        client.db.storage._call("pack", time.time() + 1, False)
        # From before it has begun to after it is done.
        time.sleep(0.01 * round_)
        node.kill()
        begun = node.log().count(" packing storage")
        notes = [txn[3] for txn in transactions(node.data_file)]
        assert b"round %d" % round_ in notes
        node.start()
        client.sync()
        assert client.root["kept"]["round"] == round_ and len(client.root["tree"]) == 5000
        if begun == begun_before:
            # Nobody waited for it, and it never came into the log.
            client.db.pack()
        begun_before = node.log().count(" packing storage")

        def packed():
            return os.path.getsize(node.data_file) < size - 2 * 50_000

        harness.wait_for("the pack in round %d" % round_, packed)
    client.close()
    assert node.stop() == 0
    transactions(node.data_file)
    assert not os.path.exists(node.data_file + ".pack")


def test_a_pack_under_way_refuses_another(nodes):
    node = nodes.alone()
    make_database(node.data_file, 20_000)
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root["tree"].clear())
    client.db.storage._call("pack", time.time() + 1, False)
    with pytest.raises(Exception, match="Already packing"):
        client.db.storage._call("pack", time.time() + 1, True)
    harness.wait_for("the pack", lambda: " packed storage" in node.log())
    client.db.pack()
    client.close()


def test_what_the_application_reaches_is_there_after_a_pack(nodes, tmp_path):
    """Random histories with every form of reference, in a storage each; more of them: STANDBY_HISTORIES."""
    histories = int(os.environ.get("STANDBY_HISTORIES", "100"))
    seed = int(os.environ.get("STANDBY_SEED", "1"))
    collected = 0
    for batch in range(0, histories, 50):
        many = range(batch, min(batch + 50, histories))
        node = nodes.alone("batch%d" % batch)
        path = {number: str(tmp_path / ("%d.fs" % number)) for number in many}
        before, at = {}, {}
        for number in many:
            rng = random.Random("%s %s" % (seed, number))
            records.write_history(path[number], rng)
            at[number] = rng.randrange(14)
            before[number] = records.moments(path[number], at[number])
        with open(node.config_path, "a") as config:
            for number in many:
                config.write("<filestorage s%d>\n  path %s\n</filestorage>\n" % (number, path[number]))
        node.start()
        for number in many:
            size = os.path.getsize(path[number])
            storage = ClientStorage(node.address, storage="s%d" % number, wait_timeout=30)
            # A second after the transaction; they are ten apart.
            storage.pack(TimeStamp(records.tid_of(at[number])).timeTime() + 1, wait=True)
            storage.close()
            collected += os.path.getsize(path[number]) < size
            after = records.moments(path[number], at[number])
            assert after == before[number], (seed, number, at[number])
        node.stop()
    assert collected > histories / 2


def test_a_reference_that_is_not_understood_stops_a_pack(nodes):
    node = nodes.alone().start()
    client = Client(node.address)
    client.commit(lambda root: root.update(kept=PersistentMapping()))
    client.commit(lambda root: root.update(other=1))
    client.close()
    storage = ClientStorage(node.address, wait_timeout=30)
    serial = storage.loadBefore(z64, maxtid)[1]
    wrong = b"cpersistent.mapping\nPersistentMapping\n.}U\x04data}U\x01k(Ncpersistent.mapping\nPersistentMapping\ntQss."
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(z64, serial, wrong, "", transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    before = os.path.getsize(node.data_file)
    with pytest.raises(Exception) as refused:
        storage.pack(time.time() + 1, wait=True)
    told = str(refused.value)
    assert "object %s" % z64.hex() in told and tid.hex() in told and "pack-gc false" in told, told
    assert "damaged" not in told
    assert os.path.getsize(node.data_file) == before
    # As advised: stored anew.
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(z64, tid, wrong.replace(b"(Ncpersistent.mapping\nPersistentMapping\ntQ", b"N"), "", transaction)
    storage.tpc_vote(transaction)
    storage.tpc_finish(transaction)
    storage.pack(time.time() + 1, wait=True)
    assert os.path.getsize(node.data_file) < before
    storage.close()
