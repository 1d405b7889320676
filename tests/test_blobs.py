"""Blobs: stored, read, undone, packed; on one node and on three; and what is left of broken uploads."""

import contextlib
import os
import shutil
import threading
import time

import pytest
import transaction
import ZODB
import ZODB.FileStorage
import ZODB.POSException
from BTrees.Length import Length
from ZODB.blob import Blob
from ZODB.utils import p64

import cluster as harness
from test_alone import call, registered, send
from zeo_client import Client, open_storage

SIZES = [0, 1, 59_000, 59_001, 1 << 20, 3_000_000]


def content(number, size):
    """Bytes that differ from blob to blob."""
    pattern = ("%08d" % number).encode()
    return (pattern * (size // 8 + 1))[:size]


def blob_client(address, cache, **options):
    return Client(address, blob_dir=str(cache), **options)


def put(root, name, data):
    blob = root.get(name)
    if blob is None:
        blob = root[name] = Blob()
    with blob.open("w") as file:
        file.write(data)


def read(root, name):
    with root[name].open("r") as file:
        return file.read()


def files(blob_dir):
    """The blobs in a directory: their paths below it, and their bytes."""
    found = {}
    for directory, _, names in os.walk(blob_dir):
        for name in names:
            path = os.path.join(directory, name)
            below = os.path.relpath(path, blob_dir)
            if name.endswith(".blob"):
                with open(path, "rb") as file:
                    found[below] = file.read()
    return found


def staged(blob_dir):
    return os.listdir(os.path.join(blob_dir, "tmp"))


def nothing_staged(nodes):
    harness.wait_for("no uploads left", lambda: not any(staged(node.blob_dir) for node in nodes))


def check_in_python(node, expected):
    """Python's FileStorage opens what the (stopped) node has, and finds the blobs."""
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        root = connection.root()
        assert {name: read(root, name) for name in expected} == expected
    db.close()


def test_blobs_of_all_sizes(nodes, tmp_path, encoding):
    node = nodes.alone(zeo=encoding, blobs=True).start()
    client = blob_client(node.address, tmp_path / "cache")
    expected = {"blob %d" % size: content(size, size) for size in SIZES}
    for name, data in expected.items():
        client.commit(lambda root: put(root, name, data))
    other = blob_client(node.address, tmp_path / "other")
    assert {name: read(other.root, name) for name in expected} == expected
    assert sorted(files(node.blob_dir).values()) == sorted(expected.values())
    assert os.stat(node.blob_dir).st_mode & 0o777 == 0o700
    for path in files(node.blob_dir):
        assert os.stat(os.path.join(node.blob_dir, path)).st_mode & 0o222 == 0
    missing = pytest.raises(ZODB.POSException.POSKeyError, match="No blob file")
    with missing:
        other.db.storage.loadBlob(p64(999), p64(7))
    client.close()
    other.close()
    node.stop()
    nothing_staged([node])
    check_in_python(node, expected)


def test_conflicts_beside_blobs_go_to_the_client(nodes, tmp_path):
    """Under <blobstorage> too, where the Python server raises them itself."""
    node = nodes.alone(blobs=True)
    with open(node.config_path, "w") as config:
        config.write(
            "<zeo>\n  address 127.0.0.1:%s\n</zeo>\n<blobstorage>\n  blob-dir %s\n"
            "  <filestorage>\n    path %s\n  </filestorage>\n</blobstorage>\n"
            % (node.port, node.blob_dir, node.data_file)
        )
    node.start()
    one, two = (blob_client(node.address, tmp_path / name) for name in ("one", "two"))
    one.commit(lambda root: (put(root, "blob", b"first"), root.update(count=Length())))
    two.sync()
    # A counter that resolves its conflicts: the transaction goes on, with its blob.
    for client, name in ((one, "by one"), (two, "by two")):
        client.root["count"].change(1)
        put(client.root, name, name.encode())
    one.manager.commit()
    with pytest.raises(ZODB.POSException.ConflictError):
        # The root itself does not resolve its conflicts.
        two.manager.commit()
    two.manager.abort()
    two.sync()
    one.root["count"].change(1)
    two.root["count"].change(1)
    with two.root["blob"].open("w") as file:
        file.write(b"second")
    one.manager.commit()
    two.manager.commit()
    one.sync()
    assert one.root["count"]() == 3
    assert read(one.root, "blob") == b"second"
    # A blob resolves none: who comes second is told, and tries again.
    for client in (one, two):
        client.sync()
        with client.root["blob"].open("w") as file:
            file.write(b"third")
    one.manager.commit()
    with pytest.raises(ZODB.POSException.ConflictError) as raised:
        two.manager.commit()
    assert raised.value.oid == two.root["blob"]._p_oid
    two.manager.abort()
    two.close()
    one.close()
    node.stop()
    nothing_staged([node])


def test_undo_brings_a_blob_back_and_a_pack_removes_it(nodes, tmp_path):
    node = nodes.alone(blobs=True).start()
    client = blob_client(node.address, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", b"first"))
    client.commit(lambda root: put(root, "blob", b"second"))
    client.commit(lambda root: put(root, "garbage", b"garbage"))
    client.commit(lambda root: root.pop("garbage"))
    second = client.db.undoLog(0, 10)[2]["id"]
    client.db.undo(second, client.manager.get())
    client.manager.commit()
    client.sync()
    assert read(client.root, "blob") == b"first"
    before = files(node.blob_dir)
    assert sorted(before.values()) == [b"first", b"first", b"garbage", b"second"]
    client.db.pack()
    assert list(files(node.blob_dir).values()) == [b"first"]
    # As FileStorage does, the state of before is kept as a whole.
    assert files(node.blob_dir + ".old") == before
    client.commit(lambda root: put(root, "blob", b"third"))
    client.db.pack()
    assert list(files(node.blob_dir).values()) == [b"third"]
    client.close()
    node.stop()
    check_in_python(node, {"blob": b"third"})


def test_row_33_nothing_is_left_of_broken_uploads(nodes, tmp_path):
    node = nodes.alone(blobs=True).start()

    def begin():
        storage = open_storage(node.address, blob_dir=str(tmp_path / "cache"))
        txn = transaction.Transaction()
        storage.tpc_begin(txn)
        for method, args in [("storeBlobStart", ())] + [("storeBlobChunk", (b"x" * 59_000,))] * 100:
            storage._async(method, *args)
        harness.wait_for("an upload", lambda: staged(node.blob_dir))
        return storage, txn

    # The client leaves.
    storage, txn = begin()
    storage.close()
    nothing_staged([node])
    # The client aborts after the upload.
    storage, txn = begin()
    storage._async("storeBlobEnd", p64(1), p64(0), b"data", id(txn))
    storage.tpc_abort(txn)
    nothing_staged([node])
    storage.close()
    # The server is killed.
    storage, txn = begin()
    node.kill()
    assert staged(node.blob_dir)
    node.start()
    nothing_staged([node])
    storage.close()
    # Interleaved uploads of two clients do not meet.
    clients = [blob_client(node.address, tmp_path / name) for name in ("a", "b")]
    threads = [
        threading.Thread(target=client.commit, args=(lambda root, n=n: put(root, n, content(n, 5_000_000)),))
        for n, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clients[0].sync()
    assert [read(clients[0].root, n) == content(n, 5_000_000) for n in (0, 1)] == [True, True]
    nothing_staged([node])
    for client in clients:
        client.close()


def test_row_33_a_pack_removes_blob_files_without_a_record(nodes, tmp_path):
    node = nodes.alone(blobs=True)
    node.start()
    client = blob_client(node.address, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", b"a blob"))
    (known,) = files(node.blob_dir)
    path = os.path.join(node.blob_dir, known)
    # Of a revision that never was, and of an object that never was.
    strays = [
        os.path.join(os.path.dirname(path), "0x0300000000000000.blob"),
        os.path.join(os.path.dirname(os.path.dirname(path)), "0xee", "0x0300000000000000.blob"),
    ]
    for stray in strays:
        os.makedirs(os.path.dirname(stray), exist_ok=True)
        shutil.copy(path, stray)
    client.db.pack()
    harness.wait_for("only the blob", lambda: list(files(node.blob_dir)) == [known])
    client.close()


def test_a_blob_that_cannot_be_kept_fails_its_transaction(nodes, tmp_path):
    node = nodes.alone(blobs=True).start()
    client = blob_client(node.address, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", b"fine"))
    tmp = os.path.join(node.blob_dir, "tmp")
    os.rmdir(tmp)
    with pytest.raises(ZODB.POSException.StorageError, match="cannot keep a blob"):
        client.commit(lambda root: put(root, "blob", content(1, 3_000_000)), attempts=1)
    os.mkdir(tmp)
    # The connection is the same, and all is well again.
    client.commit(lambda root: put(root, "blob", b"again"))
    assert sorted(files(node.blob_dir).values()) == [b"again", b"fine"]
    assert "closed a client's connection" not in node.log()
    client.close()


def test_a_client_that_leaves_in_a_download_leaves_no_open_file(nodes, tmp_path):
    node = nodes.alone(blobs=True).start()
    client = blob_client(node.address, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", content(1, 60_000_000)))
    blob = client.root["blob"]
    blob._p_activate()
    oid, serial = blob._p_oid, blob._p_serial
    client.close()

    def open_blobs():
        descriptors = "/proc/%d/fd" % node.process.pid
        targets = []
        for name in os.listdir(descriptors):
            with contextlib.suppress(OSError):
                targets.append(os.readlink(os.path.join(descriptors, name)))
        return [target for target in targets if target.endswith(".blob")]

    # A client that reads nothing of what it has asked for.
    with registered(node.address) as sock:
        send(sock, call(2, "sendBlob", oid, serial))
        harness.wait_for("a download", open_blobs)
        time.sleep(0.5)
        assert open_blobs()
    harness.wait_for("no open blob", lambda: not open_blobs(), timeout=10)


def test_every_node_has_the_blobs(nodes, tmp_path):
    cluster = nodes.cluster(blobs=True)
    for node in cluster.nodes[:2]:
        node.start()
    harness.wait_for("two voters", lambda: voters(cluster) == 2)
    client = blob_client(cluster.addresses, tmp_path / "cache")
    expected = {}
    for number, size in enumerate(SIZES):
        expected["old %d" % number] = content(number, size)
        client.commit(lambda root: put(root, "old %d" % number, content(number, size)))
    client.commit(lambda root: put(root, "old 3", b"changed"))
    client.db.undo(client.db.undoLog(0, 1)[0]["id"], client.manager.get())
    client.manager.commit()
    # The third node is new: it gets what there is by catching up, and later blobs with the log.
    cluster.nodes[2].start()
    cluster.wait_healthy()
    replica = next(node for node in cluster.nodes[:2] if node is not cluster.primary())
    replica.kill()
    for number, size in enumerate(SIZES):
        expected["new %d" % number] = content(number, size)
        client.commit(lambda root: put(root, "new %d" % number, content(number, size)))
    # This one gets the last ones from the log when it is back.
    replica.start()
    cluster.wait_level()
    there = files(cluster.nodes[0].blob_dir)
    # Each of them, and the two revisions that came of the change and the undo.
    assert len(there) == 2 * len(SIZES) + 2
    assert all(files(node.blob_dir) == there for node in cluster.nodes)
    nothing_staged(cluster.nodes)
    reader = blob_client(replica.read_only_address, tmp_path / "reader", read_only=True)
    assert {name: read(reader.root, name) for name in expected} == expected
    reader.close()
    # Aborted uploads leave nothing on the others either.
    client.manager.begin()
    put(client.root, "aborted", content(1, 1_000_000))
    storage, txn = client.db.storage, client.manager.get()
    client.connection.tpc_begin(txn)
    client.connection.commit(txn)
    client.connection.tpc_vote(txn)
    harness.wait_for("uploads everywhere", lambda: all(staged(n.blob_dir) for n in cluster.nodes))
    client.connection.tpc_abort(txn)
    client.manager.abort()
    nothing_staged(cluster.nodes)
    # A pack removes the same files everywhere.
    client.db.pack()
    left = lambda: [files(node.blob_dir) for node in cluster.nodes]  # noqa: E731
    harness.wait_for("packed nodes", lambda: all(len(found) == 2 * len(SIZES) for found in left()))
    client.close()
    cluster.stop()
    for node in cluster.nodes:
        check_in_python(node, expected)


def voters(cluster):
    picture = cluster.status()
    return picture and sum(1 for n in picture["nodes"] if n["voter"] and n["state"] == "up")


def test_row_32_no_blob_is_lost_with_the_primary(nodes, tmp_path):
    cluster = nodes.cluster(blobs=True).start()
    acknowledged, stop, errors = {}, threading.Event(), []
    clients = {n: blob_client(cluster.addresses, tmp_path / ("cache%d" % n)) for n in (1, 2)}

    def work(worker):
        client = clients[worker]
        number = worker * 1_000_000
        try:
            while not stop.is_set():
                number += 1
                name, data = "blob %d" % number, content(number, 200_000 * (number % 5))
                client.commit(lambda root: put(root, name, data))
                acknowledged[name] = data
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in (1, 2)]
    for worker in workers:
        worker.start()
    for _ in range(6):
        time.sleep(1)
        primary = cluster.primary()
        primary.kill()
        time.sleep(1)
        primary.start()
        cluster.wait_healthy()
    stop.set()
    for worker in workers:
        worker.join(60)
    assert not errors
    for client in clients.values():
        client.close()
    assert len(acknowledged) > 30
    cluster.wait_level()
    reader = blob_client(cluster.addresses, tmp_path / "reader")
    assert {name: read(reader.root, name) for name in acknowledged} == acknowledged
    reader.close()
    there = files(cluster.nodes[0].blob_dir)
    assert all(files(node.blob_dir) == there for node in cluster.nodes)
    cluster.stop()
    # What a killed primary had not proposed goes at its start; what was proposed became a blob.
    for node in cluster.nodes:
        check_in_python(node, acknowledged)


def test_a_copied_data_file_gets_its_blobs(nodes, tmp_path):
    cluster = nodes.cluster(blobs=True)
    first, second, third = cluster.nodes
    # A site of before: one node alone.
    first.configure("")
    first.start()
    client = blob_client(first.address, tmp_path / "cache")
    expected = {}
    for number in range(20):
        expected[number] = content(number, number * 10_000)
        client.commit(lambda root: put(root, number, expected[number]))
    first.stop()
    shutil.rmtree(first.data_file + ".standby")
    cluster.configure()
    # One seed copy with all blobs, one without.
    for node in (second, third):
        shutil.copy(first.data_file, node.data_file)
    shutil.copytree(first.blob_dir, second.blob_dir)
    cluster.start()
    client.commit(lambda root: put(root, "last", b"last"))
    client.close()
    cluster.wait_level()
    assert files(third.blob_dir) == files(second.blob_dir) == files(first.blob_dir)
    assert "fetched=20" in third.log() and "fetched=" not in second.log()
    nothing_staged(cluster.nodes)
    cluster.stop()
    check_in_python(third, expected)


def test_a_node_without_blob_dir_says_so(nodes, tmp_path):
    cluster = nodes.cluster(blobs=True)
    last = cluster.nodes[2]
    with open(last.config_path) as config:
        lines = [line for line in config if "blob-dir" not in line]
    with open(last.config_path, "w") as config:
        config.writelines(lines)
    for node in cluster.nodes:
        node.start()
    cluster.wait_healthy()
    client = blob_client(cluster.addresses, tmp_path / "cache")
    client.commit(lambda root: put(root, "blob", b"data"))
    assert last.wait() != 0
    assert "this node's configuration has no blob-dir" in last.log()
    client.commit(lambda root: put(root, "blob", b"more"))
    client.close()


def test_lawn_directories_stay_as_they_are(nodes, tmp_path):
    node = nodes.alone(blobs=True)
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    os.makedirs(node.blob_dir)
    with open(os.path.join(node.blob_dir, ".layout"), "w") as layout:
        layout.write("lawn")
    storage.close()
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        put(connection.root(), "python", b"from Python")
    db.close()
    node.start()
    client = blob_client(node.address, tmp_path / "cache")
    assert read(client.root, "python") == b"from Python"
    client.commit(lambda root: put(root, "standby", b"from Standby"))
    client.close()
    node.stop()
    assert {path.count(os.sep) for path in files(node.blob_dir)} == {1}
    check_in_python(node, {"python": b"from Python", "standby": b"from Standby"})
    shutil.rmtree(node.blob_dir)
