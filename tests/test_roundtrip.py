"""Databases made at random by Python's FileStorage pass through Standby unchanged, and back."""

import contextlib
import os
import random
import tempfile
import time

import pytest
import ZODB.FileStorage
from ZODB.Connection import TransactionMetaData
from ZODB.fsIndex import fsIndex
from ZODB.serialize import referencesf
from ZODB.utils import load_current, p64, z64

from zeo_client import open_storage


def record(generator, oids):
    """A record with references to some of these objects, as ZODB writes them."""
    import io

    import zodbpickle.pickle

    class Reference:
        def __init__(self, oid):
            self.oid = oid

    def persistent_id(value):
        return (value.oid, None) if isinstance(value, Reference) else None

    out = io.BytesIO()
    pickler = zodbpickle.pickle.Pickler(out, 3)
    pickler.persistent_id = persistent_id
    pickler.dump(("persistent.mapping", "PersistentMapping"))
    references = [Reference(oid) for oid in generator.sample(oids, min(len(oids), 3))]
    pickler.dump({"text": "x" * generator.randrange(200), "references": references})
    return out.getvalue()


# The record of a blob, and objects that have it.
BLOB = b"\x80\x03cZODB.blob\nBlob\nq\x01.\x80\x03N."
BLOBS = [p64(number) for number in range(100, 104)]


class Maker:
    """Random transactions on any storage."""

    def __init__(self, storage, seed, blob_files=None, first=1):
        self.storage = storage
        # Where files are made that become blobs; None: there are none.
        self.blob_files = blob_files
        self.generator = random.Random(seed)
        self.oids = [z64] + [p64(first + number) for number in range(11)]
        self.serials = {}

    def transaction(self, work):
        generator = self.generator
        extension = {"key": generator.randrange(9)} if generator.random() < 0.3 else {}
        meta = TransactionMetaData(
            b"user%d" % generator.randrange(3), b"note %d" % generator.randrange(99), extension
        )
        self.storage.tpc_begin(meta)
        try:
            work(meta)
            self.storage.tpc_vote(meta)
        except Exception:
            self.storage.tpc_abort(meta)
            return False
        self.storage.tpc_finish(meta)
        return True

    def serial(self, oid):
        try:
            return load_current(self.storage, oid)[1]
        except KeyError:
            history = self.known(oid)
            return history[0]["tid"] if history else z64

    def known(self, oid):
        try:
            return self.storage.history(oid, 1)
        except KeyError:
            return []

    def store(self, meta):
        for oid in self.generator.sample(self.oids, self.generator.randrange(1, 4)):
            data = record(self.generator, self.oids)
            self.storage.store(oid, self.serial(oid), data, "", meta)

    def store_blob(self, meta):
        oid = self.generator.choice(BLOBS)
        handle, path = tempfile.mkstemp(dir=str(self.blob_files))
        with os.fdopen(handle, "wb") as file:
            file.write(self.generator.randbytes(self.generator.choice([0, 9, 70_000])))
        self.storage.storeBlob(oid, self.serial(oid), BLOB, path, "", meta)

    def delete(self, meta):
        oid = self.generator.choice(self.oids[1:] + (BLOBS if self.blob_files else []))
        self.storage.deleteObject(oid, self.serial(oid), meta)

    def undo(self, meta):
        log = self.storage.undoLog(0, 5)
        self.storage.undo(self.generator.choice(log)["id"], meta)

    def run(self, steps):
        self.transaction(lambda meta: self.storage.store(
            z64, z64, record(self.generator, self.oids + (BLOBS if self.blob_files else [])), "", meta))
        for _ in range(steps):
            what = self.generator.random()
            if self.blob_files and what < 0.4:
                self.transaction(self.store_blob)
            elif what < 0.65:
                self.transaction(self.store)
            elif what < 0.85:
                self.transaction(self.undo)
            elif what < 0.95:
                self.transaction(self.delete)
            else:
                try:
                    self.storage.pack(time.time(), referencesf)
                except KeyError:
                    pass  # Python's packer gives up at a reference to an object that is gone.


def content(storage):
    """Every field of every transaction and record."""
    return [
        (
            txn.tid,
            txn.status,
            bytes(txn.user),
            bytes(txn.description),
            dict(txn.extension),
            [(r.oid, r.tid, r.data, r.data_txn) for r in txn],
        )
        for txn in storage.iterator()
    ]


def file_content(path):
    storage = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    try:
        return content(storage)
    finally:
        storage.close()


def blobs(storage):
    """The blobs of all revisions that have one."""
    found = {}
    for txn in storage.iterator():
        for record in txn:
            if record.data == BLOB:
                with contextlib.suppress(KeyError):
                    with open(storage.loadBlob(record.oid, record.tid), "rb") as file:
                        found[record.oid, record.tid] = file.read()
    return found


def logical(found):
    """Without the hint where else the same data stand: a copy may have another."""
    return [txn[:5] + ([record[:3] for record in txn[5]],) for txn in found]


@pytest.mark.parametrize("seed", [*range(8), 112, 117])
def test_from_python_through_standby_and_back(nodes, tmp_path, seed):
    node = nodes.alone()
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    Maker(storage, seed).run(60)
    expected = content(storage)
    storage.close()
    node.start()
    source = open_storage(node.address)
    assert content(source) == expected
    target = ZODB.FileStorage.FileStorage(str(tmp_path / "copy.fs"))
    target.copyTransactionsFrom(source)
    assert logical(content(target)) == logical(expected)
    target.close()
    source.close()

    empty = nodes.alone("empty").start()
    source = ZODB.FileStorage.FileStorage(node.data_file, read_only=True)
    target = open_storage(empty.address)
    target.copyTransactionsFrom(source)
    assert logical(content(target)) == logical(expected)
    target.close()
    source.close()
    empty.kill()
    assert logical(file_content(empty.data_file)) == logical(expected)
    node.stop()
    assert file_content(node.data_file) == expected


@pytest.mark.parametrize("seed", range(8))
def test_from_standby_to_python(nodes, seed):
    node = nodes.alone().start()
    storage = open_storage(node.address)
    maker = Maker(storage, seed)
    maker.run(60)
    expected = content(storage)
    storage.close()
    # Another client: the cache of the first may still have what a pack has removed.
    storage = open_storage(node.address)
    current = {}
    for oid in maker.oids:
        try:
            current[oid] = load_current(storage, oid)
        except KeyError:
            current[oid] = None
    storage.close()
    node.kill()
    assert file_content(node.data_file) == expected
    # Without the index that Python may have: it must make its own from the file.
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    for oid, found in current.items():
        if found is None:
            with pytest.raises(KeyError):
                load_current(storage, oid)
        else:
            assert load_current(storage, oid) == found
    storage.close()
    node.start()
    storage = open_storage(node.address)
    assert content(storage) == expected
    storage.close()


@pytest.mark.parametrize("seed", range(4))
def test_pythons_index_after_an_orderly_stop(nodes, seed):
    node = nodes.alone()
    index = node.data_file + ".index"
    node.start()
    storage = open_storage(node.address)
    # The index has a piece for each 65536 oids.
    maker = Maker(storage, seed, first=0xFFFC)
    maker.run(60)
    storage.close()
    node.stop()
    saved = fsIndex.load(index)
    assert len({oid[:6] for oid in saved["index"]}) == 2
    os.rename(index, index + ".saved")
    scanned = ZODB.FileStorage.FileStorage(node.data_file, read_only=True)
    assert saved["pos"] == scanned._pos == os.path.getsize(node.data_file)
    assert list(saved["index"].iteritems()) == list(scanned._index.iteritems())
    scanned.close()
    # Python takes it, and does not read the data file.
    os.rename(index + ".saved", index)
    restored = ZODB.FileStorage.FileStorage(node.data_file, read_only=True)
    assert restored._restore_index()[1] == saved["pos"]
    restored.close()
    # What a node that is killed leaves describes the beginning of the data file.
    node.start()
    maker.storage = open_storage(node.address)
    assert any([maker.transaction(maker.store) for _ in range(20)])
    maker.storage.close()
    node.kill()
    assert fsIndex.load(index)["pos"] == saved["pos"] < os.path.getsize(node.data_file)
    restored = ZODB.FileStorage.FileStorage(node.data_file)
    os.remove(index)
    scanned = ZODB.FileStorage.FileStorage(node.data_file, read_only=True)
    assert list(restored._index.iteritems()) == list(scanned._index.iteritems())
    scanned.close()
    restored.close()


@pytest.mark.parametrize("seed", range(6))
def test_blobs_from_python_and_from_standby(nodes, tmp_path, seed):
    """Python makes a database, Standby goes on with it, and Python again."""
    node = nodes.alone(blobs=True)
    files = tmp_path / "files"
    files.mkdir()
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir)
    Maker(storage, seed, files).run(40)
    by_python, in_python = content(storage), blobs(storage)
    storage.close()
    node.start()
    storage = open_storage(node.address, blob_dir=str(tmp_path / "cache"))
    assert (content(storage), blobs(storage)) == (by_python, in_python)
    assert in_python
    Maker(storage, seed + 1000, files).run(40)
    by_standby = content(storage)
    storage.close()
    # The cache of the first client has blobs that a pack may have removed.
    storage = open_storage(node.address, blob_dir=str(tmp_path / "another cache"))
    in_standby = blobs(storage)
    storage.close()
    node.kill()
    storage = ZODB.FileStorage.FileStorage(node.data_file, blob_dir=node.blob_dir)
    assert (content(storage), blobs(storage)) == (by_standby, in_standby)
    # Each revision of a blob has its file, also those that an undo brought back.
    revisions = {(r[0], r[1]) for txn in by_standby for r in txn[5] if r[2] == BLOB}
    assert set(in_standby) == revisions
    storage.close()
