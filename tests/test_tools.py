"""The tools that sites use with their files and servers work on ours, after a crash as well."""

import os
import subprocess
import sys
import time

import pytest
import ZODB.FileStorage
import ZODB.POSException

import cluster as harness
from zeo_client import Client, make_database, open_storage, transactions

BIN = os.path.dirname(sys.executable)


def run(*command, status=0):
    ended = subprocess.run(
        [os.path.join(BIN, command[0]), *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def used(nodes):
    """A node with a database that has seen undo, a pack and a kill; it is down."""
    node = nodes.alone()
    make_database(node.data_file, 500)
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root["tree"][1].update(x=1), note="a change")
    client.db.undo(client.db.undoLog(0, 1)[0]["id"], client.manager.get())
    client.manager.commit()
    client.db.pack()
    client.commit(lambda root: root["tree"][2].update(x=1), note="after the pack")
    client.close()
    node.kill()
    return node


def test_file_tools(used):
    path = used.data_file
    assert "after the pack" in run("fsdump", path)
    assert "after the pack" in run("fstail", path)
    assert "PersistentMapping" in run("fsoids", path, "0x00")
    # It prints only what is wrong.
    assert run("fsrefs", path).strip() in ("", "No problems found")
    run("python", "-m", "ZODB.scripts.fstest", path)


def test_repozo_makes_backups_and_brings_them_back(used, tmp_path):
    backups = tmp_path / "backups"
    backups.mkdir()
    run("repozo", "-B", "-r", backups, "-f", used.data_file)
    used.start()
    client = Client(used.address)
    client.commit(lambda root: root["tree"][3].update(x=1), note="incremental")
    client.close()
    # Beside the running server, as sites do it.
    time.sleep(1.1)
    run("repozo", "-B", "-r", backups, "-f", used.data_file)
    used.stop()
    restored = tmp_path / "restored.fs"
    run("repozo", "-R", "-r", backups, "-o", restored)
    assert transactions(restored) == transactions(used.data_file)


def test_server_tools(used):
    used.start()
    Client(used.address).close()
    address = "127.0.0.1:%d" % used.port
    assert "OK" in run("zeo-nagios", address)
    run("zeopack", "-d", "0", address)
    assert " packed storage" in used.log() or "nothing to remove" in used.log()


def test_transactions_are_copied_in_both_directions(nodes, used, tmp_path):
    used.start()
    source = open_storage(used.address)
    target = ZODB.FileStorage.FileStorage(str(tmp_path / "copy.fs"))
    target.copyTransactionsFrom(source)
    target.close()
    source.close()
    used.stop()
    assert transactions(tmp_path / "copy.fs") == transactions(used.data_file)

    empty = nodes.alone("empty").start()
    source = ZODB.FileStorage.FileStorage(used.data_file, read_only=True)
    target = open_storage(empty.address)
    target.copyTransactionsFrom(source)
    target.close()
    source.close()
    empty.kill()
    assert transactions(empty.data_file) == transactions(used.data_file)


def test_a_copied_tid_must_follow(nodes):
    node = nodes.alone().start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    storage = client.db.storage
    meta = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(meta, b"\x01" * 8, " ")
    storage.restore(b"\0" * 7 + b"\x09", b"\x01" * 8, b"data", "", None, meta)
    with pytest.raises(Exception, match="cannot be stored: the storage's last one is"):
        storage.tpc_vote(meta)
    storage.tpc_abort(meta)
    client.commit(lambda root: root.update(x=2))
    client.close()


def test_history_and_undo_log(nodes, encoding):
    node = nodes.alone(zeo=encoding).start()
    client = Client(node.address)
    for number in range(5):
        client.commit(lambda root: root.update(x=number), note="note %d" % number)
    oid = client.root._p_oid
    history = client.db.history(oid, 3)
    assert [entry["description"] for entry in history] == ["note 4", "note 3", "note 2"]
    assert all(abs(entry["time"] - time.time()) < 60 for entry in history)
    log = client.db.undoLog(1, 3)
    assert [entry["description"] for entry in log] == ["note 3", "note 2"]
    found = client.db.undoInfo(0, -20, {"description": b"note 1"})
    assert [entry["description"] for entry in found] == ["note 1"]
    client.db.undo(log[0]["id"], client.manager.get())
    with pytest.raises(ZODB.POSException.UndoError):
        client.manager.commit()
    client.manager.abort()
    client.db.undo(client.db.undoLog(0, 1)[0]["id"], client.manager.get())
    client.manager.commit()
    client.sync()
    assert client.root["x"] == 3
    client.close()
    assert harness.wait_for("the file", lambda: len(transactions(node.data_file)) == 7)
