"""One node alone: what a site sees that changes nothing but the program that reads its zeo.conf."""

import fcntl
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import transaction
import ZODB.Connection
import ZODB.FileStorage
import ZODB.POSException
from BTrees.Length import Length
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.POSException import ReadOnlyError

import cluster as harness
from zeo_client import Client, make_database, open_storage, transactions


def test_serves_an_existing_file_and_leaves_one_that_python_opens(nodes, encoding):
    node = nodes.alone(zeo=encoding)
    make_database(node.data_file, 2000)
    before = transactions(node.data_file)
    node.start()
    client = Client(node.address)
    tree = client.root["tree"]
    assert len(tree) == 2000 and tree[0]["number"] == 0 and tree[1999]["number"] == 1999
    client.commit(lambda root: root["tree"][5].update(number="five"), note="a note")
    client.commit(lambda root: root["tree"].__delitem__(7))
    client.close()
    assert node.stop() == 0
    after = transactions(node.data_file)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2
    assert after[-2][3] == b"a note"

    storage = ZODB.FileStorage.FileStorage(node.data_file)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        assert connection.root()["tree"][5]["number"] == "five"
        assert 7 not in connection.root()["tree"]
        connection.root()["python"] = "was here"
    db.close()
    node.start()
    client = Client(node.address)
    assert client.root["python"] == "was here"
    client.close()


@pytest.mark.parametrize("form", ["%d", ":%d", "*:%d"])
def test_a_port_alone_is_one_of_all_addresses(nodes, form):
    node = nodes.alone()
    node.address = ("127.0.0.1", node.port)
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        config.write(text.replace("address %s:%s" % (node.host, node.port), "address " + form % node.port))
    node.start()
    client = Client(("127.0.0.1", node.port))
    client.commit(lambda root: root.update(x=1))
    client.close()
    if os.path.exists("/proc/net/if_inet6"):
        client = Client(("::1", node.port))
        assert client.root["x"] == 1
        client.close()


def test_a_file_without_a_byte_is_a_new_one(nodes):
    node = nodes.alone()
    open(node.data_file, "w").close()
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    client.close()
    node.stop()
    assert len(transactions(node.data_file)) == 2


def test_invalidations_reach_other_clients(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    writer, reader = Client(node.address), Client(node.address)
    writer.commit(lambda root: root.update(x=1))
    for number in range(50):
        writer.commit(lambda root: root.update(x=number))

        def sees():
            reader.sync()
            return reader.root.get("x") == number

        harness.wait_for("the invalidation", sees, 5, poll=0.001)
    writer.close()
    reader.close()


def test_conflicts_are_resolved_by_the_client_or_raised(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    one, two = Client(node.address), Client(node.address)
    one.commit(lambda root: root.update(length=Length(0), mapping=PersistentMapping()))
    two.sync()
    for client in (one, two):
        client.root["length"].change(1)
    one.manager.commit()
    two.manager.commit()
    one.sync()
    assert one.root["length"]() == 2

    for client in (one, two):
        client.sync()
        client.root["mapping"]["x"] = client is one
    one.manager.commit()
    with pytest.raises(ZODB.POSException.ConflictError) as raised:
        two.manager.commit()
    assert raised.value.oid == one.root["mapping"]._p_oid
    two.manager.abort()

    # A transaction that only read an object fails if that object was changed.
    one.sync(), two.sync()
    two.connection.readCurrent(two.root["mapping"])
    two.root["other"] = 1
    one.commit(lambda root: root["mapping"].update(x="new"))
    with pytest.raises(ZODB.POSException.ReadConflictError):
        two.manager.commit()
    two.manager.abort()
    one.close()
    two.close()


def test_many_writers_of_one_counter(nodes, encoding, tmp_path):
    """The place that a client keeps after a conflict: resolution never ends in a failed finish."""
    node = nodes.alone(zeo=encoding).start()
    client = Client(node.address)
    client.commit(lambda root: root.update(length=Length(0)))
    program = (
        "import sys; sys.path.insert(0, %r)\n"
        "from zeo_client import Client\n"
        "client = Client(('127.0.0.1', %d))\n"
        "failed = 0\n"
        "for n in range(100):\n"
        "    failed += client.commit(lambda root: root['length'].change(1))[1]\n"
        "client.close()\n"
        "print('failed', failed)\n" % (harness.HERE, node.port)
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    for writer in writers:
        output, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0 and output == "failed 0\n", output
    client.sync()
    assert client.root["length"]() == 500
    client.close()


def test_row_6_objects_are_created_over_a_restart(nodes, encoding):
    """The client still holds oids that the server gave it before: nobody else may get them."""
    node = nodes.alone(zeo=encoding).start()
    old, new = Client(node.address), None
    old.commit(lambda root: root.update(old=PersistentMapping(), new=PersistentMapping()))
    for end in (node.kill, node.stop):
        end()
        node.start()
        new = Client(node.address)
        for number in range(150):
            for client, name in ((new, "new"), (old, "old")):

                def add(root):
                    root[name][number] = PersistentMapping(by=name)

                client.commit(add)
        new.close()
    old.sync()
    oids = {value._p_oid for name in ("old", "new") for value in old.root[name].values()}
    assert len(oids) == 300
    old.close()


def test_a_persistent_cache_is_verified(nodes, encoding, tmp_path):
    node = nodes.alone(zeo=encoding).start()
    cache = dict(client="c", var=str(tmp_path))
    client = Client(node.address, **cache)
    client.commit(lambda root: root.update(a=PersistentMapping(x=1), b=PersistentMapping(x=1)))
    assert client.root["a"]["x"] == client.root["b"]["x"] == 1
    client.close()
    other = Client(node.address)
    other.commit(lambda root: root["a"].update(x=2))
    other.close()
    node.stop()
    node.start()
    client = Client(node.address, **cache)
    assert (client.root["a"]["x"], client.root["b"]["x"]) == (2, 1)
    assert client.db.storage._server.client.verify_result == "quick verification"
    client.close()


def test_acknowledged_commits_survive_kills(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    client = Client(node.address)
    acknowledged = {}
    for round_ in range(3):
        for number in range(100):
            key = "%d-%d" % (round_, number)
            tid, _ = client.commit(lambda root: root.update({key: 1}), note=key)
            acknowledged[key.encode()] = tid
        node.kill()
        # At once, before Standby has repaired anything.
        notes = [txn[3] for txn in transactions(node.data_file)]
        assert set(acknowledged) <= set(notes)
        node.start()
    client.close()
    node.stop()
    notes = [txn[3] for txn in transactions(node.data_file) if txn[3] in acknowledged]
    assert sorted(notes) == sorted(acknowledged)


def test_a_start_that_is_cut_short_leaves_the_file_whole(nodes):
    """At every moment of a start, the data file holds for Python's tools all that it held before."""
    node = nodes.alone().start()
    client = Client(node.address)
    acknowledged = set()
    for number in range(200):
        note = "number %d" % number
        client.commit(lambda root: root.update({note: 1}), note=note)
        acknowledged.add(note.encode())
    client.close()
    node.kill()
    # First the kills: an orderly stop leaves nothing to do for the next start.
    for end in (node.kill, node.stop):
        for round_ in range(20):
            node.start()
            time.sleep(round_ * 0.01)
            end()
            assert acknowledged <= {txn[3] for txn in transactions(node.data_file)}, (end, round_)


def connect(address):
    """A connection without a client, to a port or to a Unix socket's path."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family)
    sock.settimeout(10)
    sock.connect(address)
    assert receive(sock) in (b"Z5", b"M5")
    return sock


def registered(address, read_only=True):
    """A connection that has registered as a client does."""
    sock = connect(address)
    sock.settimeout(30)
    send(sock, b"Z5")
    send(sock, call(1, "register", "1", read_only))
    receive(sock)
    return sock


def call(number, method, *arguments):
    """The content of a message that wants an answer."""
    return pickle.dumps((number, False, method, arguments), 3)


def receive(sock):
    """The next frame, but for `info`, which a server may send at any time; None at the end."""
    while True:
        header = exactly(sock, 4)
        content = header and exactly(sock, struct.unpack(">I", header)[0])
        if content is None or b"info" not in content[:24]:
            return content


def exactly(sock, length):
    """So many bytes; None if the connection ends before."""
    received = b""
    while len(received) < length:
        more = sock.recv(length - len(received))
        if not more:
            return None
        received += more
    return received


def send(sock, content):
    sock.sendall(struct.pack(">I", len(content)) + content)


@pytest.mark.parametrize(
    "frames, reason",
    [
        ([b"Z4"], "asks for protocol"),
        ([b"GET / HTTP/1.1"], "asks for protocol"),
        ([b"Z5", b"garbage"], "cannot decode a message"),
        ([b"Z5", b"\x80\x03cos\nsystem\n."], "is not allowed"),
        ([b"M5", b"\xc1"], "cannot decode a message"),
        ([b"Z5", b"\x80\x03(K\x01K\x00X\x04\x00\x00\x00ping)t."], "before it has registered"),
        ([b"Z5", b"x" * 70000], "at most 65536 are allowed"),
    ],
)
def test_bad_frames_close_that_connection_only(nodes, frames, reason):
    node = nodes.alone().start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    sock = connect(node.address)
    for frame in frames:
        send(sock, frame)
    try:
        assert receive(sock) is None
    except ConnectionResetError:
        pass  # Closed before it had read everything.
    harness.wait_for("a log line: %s" % reason, lambda: reason in node.log(), 5)
    client.commit(lambda root: root.update(x=2))
    client.close()


def test_ruok(nodes):
    node = nodes.alone().start()
    Client(node.address).close()
    sock = connect(node.address)
    send(sock, b"ruok")
    assert b'"last-transaction"' in receive(sock)
    # What a client was answered is over for everybody who asks then.
    client = Client(node.address)
    for number in range(200):
        sock = connect(node.address)
        client.commit(lambda root: root.update(x=number))
        send(sock, b"ruok")
        counted = json.loads(receive(sock))["1"]
        assert (counted["commits"], counted["active_txns"]) == (number + 2, 0)
        sock.close()
    client.close()


def test_row_11_a_client_that_hangs_after_its_vote(nodes):
    node = nodes.alone(zeo="  transaction-timeout 2").start()
    hanging, other = Client(node.address), Client(node.address)
    other.commit(lambda root: root.update(a=PersistentMapping(), b=PersistentMapping()))
    hanging.sync()
    storage = hanging.db.storage
    txn = transaction.TransactionManager().begin()
    mapping = hanging.root["a"]
    data, serial = storage.load(mapping._p_oid)[:2]
    meta = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(mapping._p_oid, serial, data, "", meta)
    storage.tpc_vote(meta)
    # Others go on with other objects meanwhile, and with this one when the time is over.
    other.commit(lambda root: root["b"].update(x=1))
    other.commit(lambda root: root["a"].update(x=1))
    assert "Transaction timeout after 2 seconds" in node.log()
    other.close()


@pytest.mark.parametrize(
    "fault", ["garbage", "a failing one-way call", "an unknown method", "a lost connection"]
)
def test_a_client_that_is_closed_frees_its_locks(nodes, fault):
    """The Python server keeps the lock of a client that it closes, and every later vote hangs."""
    node = nodes.alone().start()
    bad, good = open_storage(node.address), Client(node.address)
    good.commit(lambda root: root.update(x=1))
    oid = good.root._p_oid
    data, serial = good.db.storage.load(oid)[:2]
    meta = ZODB.Connection.TransactionMetaData()
    bad.tpc_begin(meta)
    bad.store(oid, serial, data, "", meta)
    bad.tpc_vote(meta)
    protocol = bad._server.client.protocol
    say = {
        "garbage": lambda: protocol.sm_protocol.transport.write(struct.pack(">I", 7) + b"garbage"),
        "a failing one-way call": lambda: protocol.call_async("storea", (1, 2)),
        "an unknown method": lambda: protocol.call_async("no_such_method", ()),
        "a lost connection": lambda: protocol.sm_protocol.transport.abort(),
    }
    protocol.loop.call_soon_threadsafe(say[fault])
    freed = threading.Thread(target=good.commit, args=[lambda root: root.update(x=2)], daemon=True)
    freed.start()
    freed.join(20)
    assert not freed.is_alive()
    good.close()
    bad.close()


def test_several_storages_in_one_file(nodes):
    node = nodes.alone()
    with open(node.config_path, "a") as config:
        config.write("<filestorage second>\n  path %s.2\n</filestorage>\n" % node.data_file)
    node.start()
    first, second = Client(node.address), Client(node.address, storage="second")
    for number in range(5):
        first.commit(lambda root: root.update(x=number))
        second.commit(lambda root: root.update(y=number))
    node.kill()
    node.start()
    for client in (first, second):
        client.sync()
    assert (first.root["x"], second.root["y"]) == (4, 4)
    assert "y" not in first.root and "x" not in second.root
    with pytest.raises(Exception):
        open_storage(node.address, storage="third", wait_timeout=2)
    first.close()
    second.close()
    node.stop()
    assert len(transactions(node.data_file)) == len(transactions(node.data_file + ".2"))


def make_read_only(node):
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        config.write(text.replace("</filestorage>", "  read-only true\n</filestorage>"))


def contents_of(directory):
    """Every file there but the node's own log and configuration, with its bytes."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            if name not in ("log.txt", "zeo.conf"):
                with open(path, "rb") as file:
                    found[path] = file.read()
    return found


@pytest.mark.parametrize("state", ["with Standby's state", "without"])
def test_a_read_only_storage_is_never_written(nodes, state):
    """Neither packed, nor its torn tail cut, nor anything made beside it; and Python may hold its lock."""
    node = nodes.alone(blobs=True)
    make_database(node.data_file, 100)
    client = Client(node.start().address, blob_dir=node.directory + "-cache")
    client.commit(lambda root: root.update(blob=Blob(b"kept")))
    client.close()
    node.stop()
    if state == "without":
        shutil.rmtree(node.data_file + ".standby")
    with open(node.data_file, "ab") as file:
        file.write(b"the beginning of a transaction")
    make_read_only(node)
    before = contents_of(node.directory)
    with open(node.data_file + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before[lock.name] = b""
        node.start()
        client = Client(node.address, read_only_fallback=True, blob_dir=node.directory + "-cache2")
        storage = client.db.storage
        assert storage.is_read_only() and len(client.root["tree"]) == 100
        assert client.root["blob"].open().read() == b"kept"
        with pytest.raises(ReadOnlyError):
            storage.pack(time.time() + 1)
        client.close()
        # Time for a checkpoint and for looks at the disk.
        time.sleep(12)
        assert node.process.poll() is None and "ERROR" not in node.log(), node.log()
        assert "it is not served" in node.log()
        node.stop()
    assert contents_of(node.directory) == before


def test_a_read_only_storage_that_is_not_there_is_not_made(nodes):
    node = nodes.alone()
    make_read_only(node)
    assert node.start().wait() != 0
    assert "does not exist" in node.log() and not os.path.exists(node.data_file)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_read_only_mount_is_served(nodes, tmp_path):
    node = nodes.alone(data_file=str(tmp_path / "mount" / "Data.fs"))
    os.mkdir(tmp_path / "mount")
    make_database(node.data_file, 100)
    make_read_only(node)
    subprocess.run(["mount", "--bind", tmp_path / "mount", tmp_path / "mount"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "mount"], check=True)
        node.start()
        client = Client(node.address, read_only=True)
        assert len(client.root["tree"]) == 100
        client.close()
        node.stop()
    finally:
        subprocess.run(["umount", tmp_path / "mount"], check=True)


@pytest.mark.parametrize("state", ["with Standby's state", "without"])
def test_create_true_takes_no_file_that_is_there(nodes, state):
    node = nodes.alone()
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        config.write(text.replace("</filestorage>", "  create true\n</filestorage>"))
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    client.close()
    node.stop()
    if state == "without":
        shutil.rmtree(node.data_file + ".standby")
    with open(node.data_file, "rb") as file:
        before = file.read()
    assert node.start().wait() != 0
    assert "remove the line or the file" in node.log()
    with open(node.data_file, "rb") as file:
        assert file.read() == before


def test_what_was_undone_in_place_is_no_revision(nodes):
    """FileStorage before ZODB 3.3 gave a transaction that was undone the status `u`."""
    node = nodes.alone()
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root()["x"] = PersistentMapping(value="kept")
    position = storage._pos
    with db.transaction() as connection:
        connection.root()["x"]["value"] = "undone"
    with db.transaction() as connection:
        connection.root()["y"] = 1
    db.close()
    os.remove(node.data_file + ".index")
    with open(node.data_file, "r+b") as file:
        file.seek(position + 16)
        file.write(b"u")
    node.start()
    client = Client(node.address)
    storage = client.db.storage
    assert client.root["x"]["value"] == "kept"
    assert [txn.status for txn in storage.iterator()] == [" ", " ", " "]
    storage.pack(time.time() + 1)
    client.connection.cacheMinimize()
    assert client.root["x"]["value"] == "kept" and client.root["y"] == 1
    client.close()


def test_a_pack_replaces_what_a_link_points_at(nodes, tmp_path):
    node = nodes.alone()
    target = tmp_path / "disk" / "real.fs"
    target.parent.mkdir()
    make_database(target, 500)
    os.remove(str(target) + ".index")
    os.symlink(target, node.data_file)
    with open(node.data_file + ".index", "wb") as index:
        index.write(b"of positions before the pack")
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root["tree"].clear())
    before = os.path.getsize(target)
    client.db.storage.pack(time.time() + 1)
    client.commit(lambda root: root.update(x=1))
    client.close()
    # Python respects the locks, under both names.
    for name in (node.data_file, str(target)):
        with pytest.raises(Exception, match="lock"):
            ZODB.FileStorage.FileStorage(name)
    node.stop()
    assert os.path.islink(node.data_file) and os.path.getsize(target) < before
    assert os.path.exists(str(target) + ".old") and not os.path.exists(node.data_file + ".old")
    assert os.path.isdir(node.data_file + ".standby") and not os.path.exists(node.data_file + ".index")
    assert len(transactions(node.data_file)) >= 1
    node.start()
    client = Client(node.address)
    assert client.root["x"] == 1
    client.close()
    node.stop()
    os.rename(target, str(target) + ".away")
    assert node.start().wait() != 0
    assert "which cannot be found" in node.log() and os.path.islink(node.data_file)


def test_row_27_a_torn_tail_is_cut_and_kept(nodes):
    node = nodes.alone()
    make_database(node.data_file, 100)
    before = transactions(node.data_file)
    with open(node.data_file, "r+b") as file:
        file.truncate(os.path.getsize(node.data_file) - 5)
    node.start()
    client = Client(node.address)
    assert client.db.storage.lastTransaction() == before[-2][0]
    client.close()
    node.stop()
    assert transactions(node.data_file) == before[:-1]
    assert os.path.exists(node.data_file + ".tr0")


def test_a_damaged_file_is_named_and_not_touched(nodes):
    node = nodes.alone()
    make_database(node.data_file, 100)
    with open(node.data_file, "r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 64)
    with open(node.data_file, "rb") as file:
        damaged = file.read()
    node.start()
    assert node.wait() == 1
    assert "Data.fs: damaged at byte " in node.log()
    with open(node.data_file, "rb") as file:
        assert file.read() == damaged


def test_a_file_of_python_2_keeps_its_magic(nodes):
    node = nodes.alone()
    make_database(node.data_file, 100)
    with open(node.data_file, "r+b") as file:
        file.write(b"FS21")
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    client.close()
    node.stop()
    with open(node.data_file, "r+b") as file:
        assert file.read(4) == b"FS21"
        file.seek(0)
        file.write(b"FS30")
    assert len(transactions(node.data_file)) > 3


def test_a_packed_file_is_served(nodes):
    node = nodes.alone()
    make_database(node.data_file, 500)
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        for number in range(0, 500, 2):
            del connection.root()["tree"][number]
    db.pack()
    db.close()
    node.start()
    client = Client(node.address)
    assert len(client.root["tree"]) == 250
    client.commit(lambda root: root["tree"][1].update(number="one"))
    client.close()
    node.stop()
    assert len(transactions(node.data_file)) > 1


def test_row_44_a_file_that_python_has_changed_is_adopted(nodes):
    node = nodes.alone().start()
    client = Client(node.address)
    client.commit(lambda root: root.update(standby=1))
    client.close()
    node.kill()
    db = ZODB.DB(ZODB.FileStorage.FileStorage(node.data_file))
    with db.transaction() as connection:
        connection.root()["python"] = 1
    db.close()
    node.start()
    client = Client(node.address)
    assert client.root["standby"] == client.root["python"] == 1
    client.commit(lambda root: root.update(standby=2))
    client.close()
    assert "was changed by another program" in node.log()
    node.stop()
    assert len(transactions(node.data_file)) == 4


def test_one_file_is_served_once(nodes):
    node = nodes.alone().start()
    Client(node.address).close()
    second = nodes.alone("second", data_file=node.data_file).start()
    assert second.wait() == 1
    assert "is in use by another program" in second.log()
    with pytest.raises(Exception):
        ZODB.FileStorage.FileStorage(node.data_file)


def test_large_transactions_spill_and_arrive(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    client = Client(node.address)

    def grow(root):
        root["big"] = PersistentMapping()
        for number in range(40):
            root["big"][number] = PersistentMapping(data=os.urandom(500_000))

    client.commit(grow)
    other = Client(node.address)
    assert [len(other.root["big"][n]["data"]) for n in range(40)] == [500_000] * 40
    other.close()
    client.close()
    node.kill()
    node.start()
    client = Client(node.address)
    assert len(client.root["big"]) == 40
    client.close()


def test_typos_are_explained(nodes, tmp_path):
    config = tmp_path / "typo.conf"
    config.write_text("<zeo>\n  adress 8100\n</zeo>\n<filestorage>\n  path x\n</filestorage>\n")
    command = [harness.STANDBY, "serve", "-C", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert "typo.conf:2: unknown key \"adress\" in <zeo>; allowed keys are address," in ended.stderr


def test_the_server_survives_what_clients_may_not_do(nodes):
    """What cannot be done is refused by an exception, not by silence."""
    node = nodes.alone().start()
    storage = open_storage(node.address)
    with pytest.raises(TypeError, match="Blobs are not supported"):
        storage._call("sendBlob", b"\0" * 8, b"\0" * 8)
    with pytest.raises(ZODB.POSException.POSKeyError):
        storage.load(b"\0" * 7 + b"\x77")
    storage.close()


def test_a_quota_is_kept(nodes):
    node = nodes.alone()
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        config.write(text.replace("</filestorage>", "  quota 20KB\n</filestorage>"))
    node.start()
    client = Client(node.address)
    for number in range(100):
        try:
            client.commit(lambda root: root.update(number=number, text="x" * 3000), attempts=1)
        except ZODB.POSException.StorageError as error:
            assert "The storage quota has been exceeded." in str(error)
            break
    assert 20_000 < os.path.getsize(node.data_file) < 27_000
    # Room again.
    client.db.pack()
    client.commit(lambda root: root.update(text="short"))
    client.close()
