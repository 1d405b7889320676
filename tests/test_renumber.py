"""Files that Python's FileStorage wrote while a clock was set back."""

import os
import subprocess

import pytest
import ZODB.blob
import ZODB.FileStorage
from persistent.TimeStamp import TimeStamp
from ZODB.Connection import TransactionMetaData
from ZODB.utils import load_current, p64, u64, z64

import cluster as harness
from zeo_client import Client

HOUR = u64(TimeStamp(2020, 1, 1, 1, 0, 0).raw()) - u64(TimeStamp(2020, 1, 1, 0, 0, 0).raw())


BLOB = p64(1)


def make(node, tmp_path, hours):
    """A root that refers to a blob, both new in each transaction; the tids, in hours."""
    start = u64(TimeStamp(2020, 1, 1).raw())
    storage = ZODB.FileStorage.FileStorage(str(tmp_path / "first"), blob_dir=str(tmp_path / "first.blobs"))
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root()["blob"] = ZODB.blob.Blob(b"first")
    root, blob = (load_current(storage, oid)[0] for oid in (z64, BLOB))
    db.close()
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir)
    for number, hour in enumerate(hours):
        tid, path = p64(start + int(hour * HOUR)), tmp_path / ("blob%d" % number)
        path.write_bytes(b"blob %d" % number)
        meta = TransactionMetaData(b"user", b"number %d" % number)
        storage.tpc_begin(meta, tid)
        storage.restore(z64, tid, root, "", None, meta)
        storage.restoreBlob(BLOB, tid, blob, str(path), None, meta)
        storage.tpc_vote(meta)
        storage.tpc_finish(meta)
    storage.close()


def told(node):
    """What is in a file, but for its tids."""
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir, read_only=True)
    found, tids = [], []
    for transaction in storage.iterator():
        records = [(record.oid, record.data) for record in transaction]
        with open(storage.loadBlob(BLOB, transaction.tid), "rb") as blob:
            found.append((transaction.description, records, blob.read()))
        tids.append(transaction.tid)
    storage.close()
    return found, tids


def renumber(*arguments):
    command = [harness.STANDBY, "renumber", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "hours, changed",
    [([0, 9, 1, 2, 3], 1), ([0, 1, 2, 0.5, 0.6, 3], 2), ([0, 1, 2, 1], 1), ([0, 1, 2, 0.5], 1)],
    ids=["once ahead", "twice back", "twice the same", "back at the end"],
)
def test_a_file_whose_tids_go_back_is_renumbered_and_served(nodes, tmp_path, hours, changed):
    node = nodes.alone(blobs=True)
    make(node, tmp_path, hours)
    with open(node.data_file, "rb") as file:
        before = file.read()
    assert node.start().wait() != 0
    assert "standby renumber %s" % node.data_file in node.log() and "a clock was set back" in node.log()

    # Nothing is replaced without the blobs, nor by a look.
    refused = renumber(node.data_file)
    assert refused.returncode == 1 and "--blob-dir" in refused.stderr, refused
    seen = renumber(node.data_file, "--blob-dir", node.blob_dir, "--dry-run")
    assert seen.returncode == 0 and "%d of %d transactions" % (changed, len(hours)) in seen.stdout, seen
    with open(node.data_file, "rb") as file:
        assert file.read() == before
    assert not os.path.exists(node.data_file + ".renumbered")

    done = renumber(node.data_file, "--blob-dir", node.blob_dir)
    assert done.returncode == 0 and "can be served" in done.stdout, done
    with open(node.data_file + ".before-renumber", "rb") as file:
        assert file.read() == before
    found, tids = told(node)
    assert tids == sorted(set(tids)) and len(tids) == len(hours)
    # FileStorage itself has put the later of two blobs with one name in the place of the earlier.
    last = {hour: number for number, hour in enumerate(hours)}
    assert [(note, blob) for note, _, blob in found] == [
        (b"number %d" % number, b"blob %d" % last[hour]) for number, hour in enumerate(hours)
    ]
    assert "nothing is to be done" in renumber(node.data_file).stdout

    node.start()
    client = Client(node.address, blob_dir=str(tmp_path / "cache"))
    refused = renumber(node.data_file)
    assert refused.returncode == 1 and "in use by another program" in refused.stderr, refused
    client.commit(lambda root: root.update(more=1))
    client.db.storage.pack(None, wait=True)
    with client.root["blob"].open() as blob:
        assert (client.root["more"], blob.read()) == (1, b"blob %d" % (len(hours) - 1))
    client.close()


def test_what_is_damaged_is_not_renumbered(nodes, tmp_path):
    node = nodes.alone(blobs=True)
    make(node, tmp_path, [0, 2, 1])
    with open(node.data_file, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert node.start().wait() != 0
    assert "damaged at byte" in node.log() and "renumber" not in node.log()
    refused = renumber(node.data_file, "--blob-dir", node.blob_dir)
    assert refused.returncode == 1 and "damaged at byte" in refused.stderr, refused
