"""One client of a cluster in trouble: an application server's process, with stock ZEO, or with standby_zodb.

    python tests/chaos/client.py NAME WORLD

WORLD is a JSON file: the addresses and how often to do something. The client moves amounts between accounts, counts
(with and without conflict resolution), appends to a journal, keeps blobs, reads everything at one moment. It is
never told of trouble. What it wants and what it is told goes to NAME.log, a JSON object a line:

    {"try": 17, "kind": "transfer", "what": […], "begin": SECONDS}
    {"seq": 17, "end": SECONDS, "outcome": "ok", "tid": "…", "counter": 3, …}

`outcome` is ok, refused (certainly not committed) or unknown. `counter` is what it saw of the counter. Seconds are
of the machine's monotonic clock, which all clients share. What it committed stands in its ledger in the database too,
under the same number: the checker compares.
"""

import hashlib
import json
import logging
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import transaction  # noqa: E402
import ZODB  # noqa: E402
from BTrees.Length import Length  # noqa: E402
from BTrees.LOBTree import LOBTree  # noqa: E402
from persistent.mapping import PersistentMapping  # noqa: E402
from ZODB.blob import Blob  # noqa: E402
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError, StorageError  # noqa: E402

from zeo_client import open_storage  # noqa: E402

try:
    import standby_zodb
except ImportError:
    standby_zodb = None

ACCOUNTS = 12
EACH = 1000
COUNTERS = 2
KINDS = {
    "transfer": 30,
    "count": 18,
    "length": 10,
    "journal": 12,
    "blob": 3,
    "look": 24,
    "again": 3,
}


def found(world):
    """Fills an empty database."""
    storage = open_storage(world["addresses"], blob_dir=world["directory"] + "/founder")
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        root = connection.root()
        root["accounts"] = PersistentMapping()
        for number in range(ACCOUNTS):
            root["accounts"][number] = PersistentMapping(amount=EACH)
        root["counters"] = PersistentMapping()
        for number in range(COUNTERS):
            root["counters"][number] = PersistentMapping(value=0)
        root["length"] = Length()
        root["journal"] = LOBTree()
        root["blobs"] = PersistentMapping()
        root["ledgers"] = PersistentMapping()
        for name in world["writers"]:
            root["ledgers"][name] = LOBTree()
    db.close()


class Client:
    def __init__(self, name, world):
        self.name, self.world = name, world
        self.chance = random.Random("%s %s %s" % (world["seed"], name, time.time()))
        self.path = os.path.join(world["directory"], name + ".log")
        self.seq = self.last_seq() + 1
        self.log = open(self.path, "a")
        self.stopping = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_):
        self.stopping = True

    def last_seq(self):
        """Goes on after what it, or its predecessor that was killed, has tried."""
        if not os.path.exists(self.path):
            return 0
        last = 0
        with open(self.path, "rb+") as log:
            whole = log.read()
            # A killed predecessor's last line may be cut.
            log.truncate(whole.rfind(b"\n") + 1)
        for line in whole.splitlines()[-20:]:
            try:
                line = json.loads(line)
                last = max(last, line.get("try", 0), line.get("seq", 0))
            except ValueError:
                pass
        return last

    def say(self, **words):
        self.log.write(json.dumps(words) + "\n")
        self.log.flush()

    def connect(self):
        world, directory = self.world, self.world["directory"]
        options = dict(
            blob_dir=os.path.join(directory, self.name + ".blobs"),
            blob_cache_size=20 << 20,
            # A request that cannot be sent fails soon, so that the client tells of it.
            wait_timeout=10,
            server_sync=True,
        )
        if self.name in world["persistent"]:
            options.update(client=self.name, var=directory)
        addresses = world["addresses"]
        if self.name in world["replicas"]:
            addresses = world["replicas"][self.name]
            options.update(read_only=True, server_sync=False)
        while True:
            storage = None
            try:
                if self.name.startswith("p"):
                    # It learns the other addresses.
                    storage = standby_zodb.ClientStorage(addresses[:1], **options)
                elif self.name.startswith("q"):
                    storage = open_storage([tuple(world["router"])], **options)
                else:
                    storage = open_storage(addresses, **options)
                # It reads the root object, and the server may die at that moment.
                self.db = ZODB.DB(storage)
                break
            except Exception as error:
                # Stock clients that find no server in time give up; their supervisors start them again.
                self.say(at=time.monotonic(), connecting="%s: %s" % (type(error).__name__, error))
                if storage is not None:
                    storage.close()
                if self.stopping:
                    sys.exit()
                time.sleep(0.2)
        # A tpc_finish that has begun may have been carried out, whatever comes of it.
        finish = storage.tpc_finish

        def tpc_finish(*args):
            self.finishing = True
            return finish(*args)

        storage.tpc_finish = tpc_finish
        self.manager = transaction.TransactionManager(explicit=False)
        while True:
            try:
                self.connection = self.db.open(self.manager)
                break
            except Exception:
                time.sleep(0.1)

    def run(self):
        self.connect()
        kinds = ["look"] if self.name not in self.world["writers"] else list(KINDS)
        weights = [KINDS[kind] for kind in kinds]
        while not self.stopping:
            self.once(self.chance.choices(kinds, weights)[0])
            time.sleep(self.chance.random() * 2 * self.world["pause"])
        self.manager.abort()
        self.connection.close()
        self.db.close()

    def once(self, kind):
        seq, self.seq = self.seq, self.seq + 1
        begin, self.finishing, self.seen = time.monotonic(), False, {}
        what = self.plan(kind)
        self.say(**{"try": seq, "kind": kind, "what": what, "begin": begin})
        outcome, error, tid = "ok", None, None
        try:
            self.manager.begin()
            root = self.connection.root()
            self.seen["counter"] = root["counters"][0]["value"]
            getattr(self, kind)(root, *what)
            if kind not in ("look", "again"):
                root["ledgers"][self.name][seq] = (kind, *what)
                self.manager.get().note("%s %d" % (self.name, seq))
                self.manager.commit()
                tid = self.db.storage.lastTransaction().hex()
            else:
                self.manager.abort()
        except POSKeyError as lost:
            self.manager.abort()
            outcome, error = "unknown" if self.finishing else "refused", repr(lost)
            self.say(violation="an object is not there: %r" % lost, seq=seq)
        except (ConflictError, StorageError) as refused:
            self.manager.abort()
            outcome = "unknown" if self.finishing else "refused"
            if standby_zodb is not None and isinstance(refused, standby_zodb.NotCommittedError):
                outcome = "refused"
            elif outcome == "unknown" and self.name.startswith("p"):
                self.say(violation="a commit is ambiguous: %r" % refused, seq=seq)
            error = "%s: %s" % (type(refused).__name__, str(refused)[:200])
            if isinstance(refused, ReadOnlyError):
                self.say(violation="a client that writes is told to read only", seq=seq)
        self.say(
            seq=seq,
            end=time.monotonic(),
            outcome=outcome,
            error=error,
            tid=tid,
            last=self.db.storage.lastTransaction().hex(),
            **self.seen,
        )
        if outcome != "ok":
            time.sleep(0.05)

    def plan(self, kind):
        chance = self.chance
        if kind == "transfer":
            return [*chance.sample(range(ACCOUNTS), 2), chance.randint(1, 50)]
        if kind == "count":
            return [chance.randrange(COUNTERS)]
        if kind == "blob":
            return [chance.randrange(4), chance.randrange(1 << 30), chance.choice([10, 1000, 70_000, 400_000])]
        return []

    def transfer(self, root, giver, taker, amount):
        root["accounts"][giver]["amount"] -= amount
        root["accounts"][taker]["amount"] += amount

    def count(self, root, number):
        root["counters"][number]["value"] += 1

    def length(self, root):
        root["length"].change(1)

    def journal(self, root):
        journal = root["journal"]
        journal[journal.maxKey() + 1 if journal else 0] = (self.name, self.seq - 1)

    def blob(self, root, slot, seed, size):
        data = random.Random(seed).randbytes(size)
        root["blobs"]["%s %d" % (self.name, slot)] = (Blob(data), hashlib.sha256(data).hexdigest())

    def look(self, root):
        """Everything at one moment."""
        total = sum(root["accounts"][number]["amount"] for number in range(ACCOUNTS))
        if total != ACCOUNTS * EACH:
            self.say(violation="the sum of the accounts is %d" % total, seq=self.seq - 1)

    def again(self, root):
        """A blob reads as it was written."""
        names = sorted(root["blobs"])
        if names:
            name = self.chance.choice(names)
            blob, digest = root["blobs"][name]
            with blob.open() as file:
                if hashlib.sha256(file.read()).hexdigest() != digest:
                    self.say(violation="blob %s is not what was written" % name, seq=self.seq - 1)


def pack(world):
    """An administrator's."""
    storage = open_storage(world["addresses"], blob_dir=world["directory"] + "/packer", wait_timeout=5)
    db = ZODB.DB(storage)
    db.pack()
    db.close()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    with open(sys.argv[2]) as file:
        WORLD = json.load(file)
    WORLD["addresses"] = [tuple(address) for address in WORLD["addresses"]]
    for reader, addresses in WORLD["replicas"].items():
        WORLD["replicas"][reader] = [tuple(address) for address in addresses]
    if sys.argv[1] == "found":
        found(WORLD)
    elif sys.argv[1] == "pack":
        pack(WORLD)
    else:
        Client(sys.argv[1], WORLD).run()
