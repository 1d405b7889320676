"""What the tests do with the stock ZODB and ZEO packages."""

import time

import transaction
import ZEO.ClientStorage
import ZODB
import ZODB.FileStorage
import ZODB.POSException
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
from ZODB.utils import z64

RETRY = (ZODB.POSException.ConflictError, ZODB.POSException.StorageError)


def is_passing(error):
    """True of an error after which users try again: also of that of a ZEO 5 client which loses its connection between
    two steps of a call (its source: "race condition potential")."""
    return isinstance(error, RETRY) or isinstance(error, AttributeError) and "call_sync" in str(error)


def open_storage(addresses, **options):
    options.setdefault("wait_timeout", 30)
    # A transaction begins with all that was committed before it, not with what has arrived so far.
    options.setdefault("server_sync", True)
    return ZEO.ClientStorage.ClientStorage(addresses, **options)


def open_db(addresses, **options):
    return ZODB.DB(open_storage(addresses, **options))


class Client:
    """One database object that is never reopened, whatever happens to the servers."""

    def __init__(self, addresses, **options):
        self.manager = transaction.TransactionManager(explicit=False)
        self.db = open_db(addresses, **options)
        self.connection = self.db.open(self.manager)

    @property
    def root(self):
        return self.connection.root()

    def close(self):
        self.manager.abort()
        self.connection.close()
        self.db.close()

    def sync(self):
        """Begins a transaction with all that is committed; again if a killed server's connection is lost
        in that moment, of which ZEO tells by an error."""
        for attempt in range(200):
            try:
                return self.connection.sync()
            except RETRY:
                if attempt == 199:
                    raise
                time.sleep(0.02)

    def commit(self, change, note=None, attempts=200):
        """Runs change(root) and commits, again if the outcome is an error that ZODB's users retry.

        Returns (tid, attempts that ended in an error).
        """
        failed = 0
        while True:
            try:
                self.manager.begin()
                change(self.root)
                if note:
                    self.manager.get().note("%s" % note)
                self.manager.commit()
                return self.db.storage.lastTransaction(), failed
            except (*RETRY, AttributeError) as error:
                self.manager.abort()
                failed += 1
                if failed >= attempts or not is_passing(error):
                    raise
                time.sleep(0.02)


class Voted:
    """A transaction of a storage's own that has voted and not finished: of a new object, or of one that
    is there."""

    def __init__(self, addresses, oid=None):
        self.storage = open_storage(addresses, wait_timeout=5)
        data, serial = b"\x80\x02cpersistent\nPersistent\nq\x01.N.", z64
        if oid is not None:
            data, serial = self.storage.load(oid)
        self.oid = oid or self.storage.new_oid()
        self.txn = transaction.TransactionManager().begin()
        self.storage.tpc_begin(self.txn)
        self.storage.store(self.oid, serial, data, "", self.txn)
        self.storage.tpc_vote(self.txn)

    def finish(self):
        return self.storage.tpc_finish(self.txn)


def transactions(path):
    """All transactions of a data file, read by Python's FileStorage."""
    storage = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    try:
        return [
            (
                txn.tid,
                txn.status,
                bytes(txn.user),
                bytes(txn.description),
                [(record.oid, record.tid, record.data) for record in txn],
            )
            for txn in storage.iterator()
        ]
    finally:
        storage.close()


def make_database(path, objects=10000):
    """A data file as Python's FileStorage writes it, with that many objects in BTrees."""
    storage = ZODB.FileStorage.FileStorage(str(path))
    db = ZODB.DB(storage)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    tree = connection.root()["tree"] = OOBTree()
    manager.commit()
    for start in range(0, objects, 1000):
        for number in range(start, min(start + 1000, objects)):
            tree[number] = PersistentMapping(number=number)
        manager.commit()
    # An undo, so that the file has back pointers.
    tree[0]["number"] = "changed"
    manager.commit()
    db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
    manager.commit()
    connection.close()
    db.close()
