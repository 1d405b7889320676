"""Writes the seeds of the fuzz targets: what real programs write. Needs a Python with ZEO.

    python fuzz/seeds.py

`run.py` does it before it runs the targets.
"""

import json
import os
import pickle
import struct
import sys
import tempfile

import msgpack
import transaction
import ZODB
import ZODB.FileStorage
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping

HERE = os.path.dirname(os.path.abspath(__file__))


def seed(target, name, data):
    directory = os.path.join(HERE, "corpus", target)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, name), "wb") as out:
        out.write(data)


def database():
    """A small data file with several revisions, an undo and a deletion; and its records."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "Data.fs")
        storage = ZODB.FileStorage.FileStorage(path)
        db = ZODB.DB(storage)
        manager = transaction.TransactionManager()
        root = db.open(manager).root()
        for number in range(3):
            root["tree"] = root.get("tree") or OOBTree()
            root["tree"][number] = PersistentMapping(number=number, text="x" * number)
            manager.get().note("note %d" % number)
            manager.get().setUser("user")
            manager.commit()
        db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
        manager.commit()
        records = [record.data for txn in storage.iterator() for record in txn if record.data]
        db.close()
        with open(path, "rb") as file:
            return file.read(), records


def frame(content):
    return struct.pack(">I", len(content)) + content


def calls():
    oid, tid = b"\0" * 7 + b"\1", b"\3" * 8
    yield "tpc_begin", (1, b"user", b"note", {"key": "value"}), True
    yield "storea", (oid, tid, b"data", 1), True
    yield "checkCurrentSerialInTransaction", (oid, tid, 1), True
    yield "storeBlobStart", (), True
    yield "storeBlobChunk", (b"blob",), True
    yield "storeBlobEnd", (oid, tid, b"data", 1), True
    yield "storeBlobShared", (oid, tid, b"data", "x.tmp", 1), True
    yield "undoa", (b"AAAAAAAAAAE=", 1), True
    yield "restorea", (oid, tid, b"data", tid, 1), True
    yield "deleteObject", (oid, tid, 1), True
    yield "vote", (1,), False
    yield "tpc_finish", (1,), False
    yield "loadBefore", (oid, tid), False
    yield "undoInfo", (0, -20, {"user_name": b"user"}), False
    yield "iterator_start", (tid, None), False
    yield "pack", (1.5, True), False
    yield "sendBlob", (oid, tid), False
    yield "new_oids", (), False


def main():
    data, records = database()
    seed("data_fs", "database", data[4:])
    for number, record in enumerate(records):
        seed("references", "record%d" % number, record)
        seed("pickle", "record%d" % number, record)
    encodings = {
        "pickle": (b"Z5", lambda call: pickle.dumps(call, 3)),
        "msgpack": (b"M5", lambda call: msgpack.packb(call, use_bin_type=True)),
    }
    for name, (version, encode) in encodings.items():
        register = encode((1, False, "register", ("1", False)))
        session = frame(version) + frame(register)
        for number, (method, args, one_way) in enumerate(calls()):
            call = encode((number, one_way, method, args))
            seed("pickle" if name == "pickle" else "msgpack", method, call)
            session += frame(call)
        seed("session", name, session)
    entry = b"e" + struct.pack(">QQBII", 1, 1, 0, 0, 1) + b"\0" * 4 + b"x"
    state = b"h" + struct.pack(">QQQ", 1, 2, 1)
    frames = [state, entry, entry + state]
    seed("log_segment", "frames", b"".join(struct.pack("BB", len(f), 0) + f for f in frames))
    message = struct.pack(">BB10QB", 1, 3, 1, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0) + struct.pack(">I", 0)
    message += struct.pack(">IBQQII", 1, 0, 1, 2, 0, 1) + b"x" + b"\0"
    seed("peer_message", "append", message)
    meta = struct.pack(">QBH", 5, 32, 4) + b"user" + struct.pack(">HH", 0, 0)
    record = struct.pack(">QBQ", 1, ord("d"), 4) + b"data"
    blob = struct.pack(">QB", 1, ord("u")) + b"t" * 16 + struct.pack(">Q", 9) + b"s" * 32
    head = struct.pack(">I", 1) + b"1" + struct.pack(">I", len(meta)) + meta + struct.pack(">I", 0)
    seed("peer_message", "transaction", b"t" + head + record)
    seed("peer_message", "with_blob", b"b" + head + struct.pack(">I", 1) + blob + record)
    seed("peer_message", "record", record)
    seed("peer_frame", "begin", b"t" + meta)
    seed("peer_frame", "record", b"d" + record)
    seed("peer_frame", "hole", b"f" + bytes(15) + b"\x01")
    seed("peer_frame", "digests", b"d" + bytes(7) + b"\x05p" + bytes(4))
    upload = {"storage": "1", "transfer": "00" * 16, "len": 5, "sha256": "00" * 32}
    seed("peer_frame", "upload", b"a" + json.dumps(upload).encode())
    with open(os.path.join(HERE, "..", "README.md")) as readme:
        lines = [line[4:] for line in readme if line.startswith("    ")]
    text = "".join(lines)
    start, end = text.index("<zeo>"), text.index("</standby>") + len("</standby>\n")
    config = text[start:end].replace("secret-file        /srv/standby/secret\n", "")
    seed("zconfig", "cluster", config.encode())
    seed("zconfig", "alone", config[: config.index("<standby>")].encode())


if __name__ == "__main__":
    sys.exit(main())
