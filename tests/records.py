"""Random records as ZODB databases have them: of every protocol, from Python 3, `zodbpickle` and Python 2, with
every form of persistent id; and what ZODB follows when it loads them.

    python tests/records.py --seconds 600 [--seed N]

compares Standby's scan of such records, whole and damaged, with what ZODB follows, until the time is over.
"""

import argparse
import io
import logging
import os
import pickle
import random
import struct
import subprocess
import time
import warnings
from binascii import b2a_base64

import zodbpickle.pickle
from persistent.TimeStamp import TimeStamp
from ZODB._compat import ascii_bytes
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError, UndoError
from ZODB.serialize import ObjectReader
from ZODB.utils import p64, u64, z64

HERE = os.path.dirname(os.path.abspath(__file__))
SCAN = os.path.join(HERE, "..", "target", "release", "examples", "references")


class Wrapped:
    """A persistent id: the pickler below writes what it holds as one."""

    def __init__(self, persistent_id):
        self.persistent_id = persistent_id


class Values:
    """Random values, and persistent ids among them."""

    def __init__(self, rng, oids):
        self.rng, self.oids = rng, oids

    def oid(self):
        return struct.pack(">Q", self.rng.choice(self.oids))

    def reference(self):
        oid = self.oid()
        return Wrapped(
            self.rng.choice(
                [
                    oid,
                    (oid, dict),
                    (oid, ("a.module", "AClass")),
                    [oid],
                    ["w", (oid,)],
                    ["w", (oid, "other")],
                    ["n", ("other", oid)],
                    ["m", ("other", oid, dict)],
                ]
            )
        )

    def any(self, depth=0):
        rng = self.rng
        kinds = 12 if depth < 4 else 8
        kind = rng.randrange(kinds)
        if kind == 0:
            return rng.choice([None, True, False, 1.5, -3, 300, 70000, 2**40, -(2**70)])
        if kind == 1:
            return rng.choice(["", "text", "w", "latin1", "ABCDEFGH", "dr\u00fcber \\u0041", "\u20ac" * 8])
        if kind == 2:
            # Bytes that look like an oid and are none.
            return rng.choice([b"", b"bytes", self.oid(), b"x" * 300])
        if kind < 8:
            return self.reference()
        inner = [self.any(depth + 1) for _ in range(rng.randrange(5))]
        if kind == 8:
            return inner
        if kind == 9:
            return tuple(inner)
        if kind == 10:
            return {("key", number): value for number, value in enumerate(inner)}
        return {number: (value, value) for number, value in enumerate(inner)}


def written(values, rng, protocols=(1, 2, 3, 4, 5)):
    """A record that a pickler of Python 3 writes."""
    zodb = [(zodbpickle.pickle, protocol) for protocol in protocols if protocol < 4]
    module, protocol = rng.choice([(pickle, protocol) for protocol in protocols] + zodb)

    class Pickler(module.Pickler):
        def persistent_id(self, thing):
            return thing.persistent_id if isinstance(thing, Wrapped) else None

    file = io.BytesIO()
    pickler = Pickler(file, protocol)
    pickler.dump(rng.choice([dict, (dict, None), (("a.module", "AClass"), None)]))
    if protocol < 4 and rng.random() < 0.5:
        pickler.clear_memo()
    pickler.dump(values.any())
    return file.getvalue()


class Opcodes:
    """Writes pickles by hand, as Python 2 and old programs did."""

    def __init__(self, values, rng):
        self.values, self.rng = values, rng
        self.protocol = rng.randrange(3)
        self.memo = 0

    def put(self, code):
        """`code`, perhaps kept in the memo and taken from there again."""
        if self.rng.random() < 0.6:
            return code
        number = self.memo
        self.memo += 1
        if self.protocol == 0:
            put, get = b"p%d\n" % number, b"g%d\n" % number
        elif number < 256 and self.rng.random() < 0.5:
            put, get = b"q%c" % number, b"h%c" % number
        else:
            put, get = b"r" + struct.pack("<I", number), b"j" + struct.pack("<I", number)
        return code + put + self.rng.choice([b"", b"0" + get, b"(" + get + b"10" + get])

    def native(self, string):
        """A `str` of Python 2."""
        if self.protocol == 0:
            text = repr(string)[1:]
            if self.rng.random() < 0.3:
                text = "'%s'" % "".join("\\%03o" % byte for byte in string)
            return self.put(b"S" + text.encode() + b"\n")
        if self.rng.random() < 0.8:
            return self.put(b"U%c" % len(string) + string)
        return self.put(b"T" + struct.pack("<i", len(string)) + string)

    def text(self, text):
        if self.protocol == 0:
            # As Python 3 and Python 2 escape what would end the line.
            escaped = text.replace("\\", "\\u005c").replace("\n", "\\u000a").replace("\r", "\\u000d")
            escaped = escaped.replace("\0", "\\u0000").replace("\x1a", "\\u001a")
            return self.put(b"V" + escaped.encode("raw-unicode-escape") + b"\n")
        utf8 = text.encode()
        return self.put(b"X" + struct.pack("<I", len(utf8)) + utf8)

    def sequence(self, *items):
        if self.protocol == 2 and 0 < len(items) < 4:
            return self.put(b"".join(items) + bytes([0x84 + len(items)]))
        return self.put(b"(" + b"".join(items) + b"t")

    def list(self, *items):
        shape = self.rng.randrange(3)
        if shape == 0:
            return self.put(b"(" + b"".join(items) + b"l")
        if shape == 1:
            return self.put(b"]") + b"".join(item + b"a" for item in items)
        return self.put(b"](" + b"".join(items) + b"e")

    def name(self, module, name):
        return self.put(b"c" + module + b"\n" + name + b"\n")

    def string(self, oid):
        """An oid, in each form that old programs gave it."""
        rng = self.rng
        forms = [lambda: self.native(oid), lambda: self.put(b"C\x08" + oid)]
        text = oid.decode("latin1")
        if oid.isascii():
            forms.append(lambda: self.text(text))
        forms.append(
            lambda: self.put(
                self.name(b"_codecs", b"encode")
                + self.sequence(self.text(text), rng.choice([self.native, self.ascii])(b"latin1"))
                + b"R"
            )
        )
        forms.append(
            lambda: self.put(
                self.name(b"copy_reg", b"_reconstructor")
                + self.sequence(
                    self.name(b"zodbpickle", b"binary"), self.name(b"__builtin__", b"str"), self.native(oid)
                )
                + b"R"
            )
        )
        return rng.choice(forms)()

    def ascii(self, string):
        return self.text(string.decode())

    def reference(self):
        oid = self.values.oid()
        string, a_class = self.string(oid), self.name(b"__builtin__", b"dict")
        kind = self.rng.randrange(9)
        if kind < 2:
            return self.put(string + b"Q")
        if kind < 4:
            return self.put(self.sequence(string, a_class) + b"Q")
        if kind == 4:
            return self.put(self.sequence(string, self.sequence(self.native(b"m"), self.native(b"C"))) + b"Q")
        if kind == 5 and oid.isascii() and b"\n" not in oid:
            return self.put(b"P" + oid + b"\n")
        if kind == 6:
            return self.put(self.list(string) + b"Q")
        if kind == 7:
            return self.put(self.list(self.native(b"w"), self.sequence(string)) + b"Q")
        arguments = self.sequence(self.native(b"db"), string, a_class)
        return self.put(self.list(self.native(b"m"), arguments) + b"Q")

    def any(self, depth=0):
        kind = self.rng.randrange(9 if depth < 4 else 6)
        if kind == 0:
            return self.put(self.rng.choice([b"N", b"I01\n", b"I7\n", b"L8L\n", b"F1.5\n", b"K\x05", b"M\x05\x01"]))
        if kind == 1:
            return self.native(self.rng.choice([b"", b"text", b"with'quote\"s\\", self.values.oid()]))
        if kind == 2:
            return self.text(self.rng.choice(["", "text", "dr\u00fcber \\u0041"]))
        if kind < 6:
            return self.reference()
        inner = [self.any(depth + 1) for _ in range(self.rng.randrange(4))]
        if kind == 6:
            return self.list(*inner)
        if kind == 7:
            return self.sequence(*inner)
        pairs = [self.native(b"key%d" % number) + value for number, value in enumerate(inner)]
        return self.put(b"(d") + b"".join(pair + b"s" for pair in pairs)

    def record(self):
        a_class = self.name(b"__builtin__", b"dict")
        head = b"\x80\x02" if self.protocol == 2 else b""
        return head + self.rng.choice([a_class, self.sequence(a_class, b"N")]) + b"." + head + self.any() + b"."


def random_record(rng):
    oids = [1, 0x102, 0x48E7, 0x4142434445464748, 0x0A0D0A5C27220A00, 2**64 - 1, 0x7FFFFFFFFFFFFFFF]
    values = Values(rng, oids)
    return Opcodes(values, rng).record() if rng.random() < 0.5 else written(values, rng)


class Followed:
    """Stands where a connection and its cache are, and notes which objects are asked for."""

    def __init__(self):
        self.oids = set()

    def get(self, oid, default=None):
        self.oids.add(oid)
        return self

    def get_connection(self, database):
        other = Followed()
        other._cache = other
        return other


class Reader(ObjectReader):
    """ZODB's reader, but that it takes byte strings of Python 2 for what they were there, and protocols 4 and 5,
    which `zodbpickle` does not read."""

    def _get_unpickler(self, record):
        module = pickle if record[:1] == b"\x80" and record[1] > 3 else zodbpickle.pickle

        class Unpickler(module.Unpickler):
            def find_class(self, module, name):
                if name == "_reconstructor":
                    # Python 2's `zodbpickle.binary` is `bytes` now, which its `copy_reg` cannot make.
                    return lambda binary, base, string: ascii_bytes(string)
                return object if module == "a.module" else super().find_class(module, name)

        warnings.simplefilter("ignore", DeprecationWarning)
        unpickler = Unpickler(io.BytesIO(record), errors="strict" if module is pickle else "bytes")
        unpickler.persistent_load = self._persistent_load
        return unpickler


def followed(record):
    """The oids of the objects of this database that ZODB loads or makes a ghost of."""
    followed = Followed()
    Reader(followed, followed, lambda connection, module, name: object).getState(record)
    return {oid.hex() for oid in followed.oids}


class Scan:
    """Standby's answer."""

    def __enter__(self):
        self.process = subprocess.Popen([SCAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def __call__(self, record):
        """The oids, or text that says why they cannot be told."""
        self.process.stdin.write(struct.pack(">I", len(record)) + record)
        self.process.stdin.flush()
        line = self.process.stdout.readline().decode()
        return line[2:] if line.startswith("!") else set(line.split())


def damaged(record, rng):
    record = bytearray(record)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(record))
        change = rng.randrange(4)
        if change == 0:
            record[at] = rng.choice([rng.randrange(256), rng.choice(b"QPtl]a(e0R\x81\x85\x86hq")])
        elif change == 1:
            del record[at : at + rng.randrange(1, 4)]
        elif change == 2:
            record[at:at] = rng.choice([b"Q", b"t", b"(", b"l", b"N", b"0", b"2", b"\x85", b"R"])
        else:
            to = rng.randrange(len(record))
            record[at:at] = record[to : to + rng.randrange(1, 12)]
        record = record or bytearray(b".")
    return bytes(record)


def compare(rng, scan):
    """One record, and that record damaged."""
    # Damaged records are not news here.
    logging.getLogger("ZODB.serialize").setLevel(logging.CRITICAL)
    record = random_record(rng)
    right, told = followed(record), scan(record)
    assert told == right, (record, told, right)
    broken = damaged(record, rng)
    try:
        # Counts above 2**31 in a damaged record make the unpickler allocate as much.
        right = followed(broken) if b"r" not in broken and b"j" not in broken else set()
    except Exception:
        return
    told = scan(broken)
    # What cannot be told stops a pack: right as well.
    assert isinstance(told, str) or told >= right, (broken, told, right)


OIDS = [p64(number) for number in (0, 1, 2, 0x102, 0x48E7, 0x4142434445464748)]


def tid_of(number):
    """Of the transaction `number` of a random history: ten seconds apart."""
    return TimeStamp(2020, 1, 1, 0, number // 6, number % 6 * 10).raw()


def write_history(path, rng, length=14):
    """A data file of random transactions: records, undos, deletions."""
    storage = FileStorage(path)

    def record():
        oids = [u64(oid) for oid in rng.sample(OIDS, 3)]
        values = Values(rng, oids)
        if rng.random() < 0.5:
            return Opcodes(values, rng).record()
        return written(values, rng, protocols=(1, 2, 3))

    serials = {}
    for number in range(length):
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction, tid_of(number))
        choice, changed = rng.random(), []
        if number and choice < 0.25:
            undone = tid_of(rng.randrange(max(0, number - 3), number))
            try:
                changed = storage.undo(b2a_base64(undone).rstrip(), transaction)[1]
            except UndoError:
                storage.tpc_abort(transaction)
                continue
        elif len(serials) > 2 and choice < 0.35:
            changed = [rng.choice([oid for oid in serials if oid != z64])]
            storage.deleteObject(changed[0], serials[changed[0]], transaction)
        else:
            changed = {z64} if number == 0 else set(rng.sample(OIDS, rng.randrange(1, 4)))
            for oid in changed:
                storage.store(oid, serials.get(oid, z64), record(), "", transaction)
        storage.tpc_vote(transaction)
        storage.tpc_finish(transaction)
        serials.update((oid, tid_of(number)) for oid in changed)
    storage.close()


def reachable(storage, tid):
    """What the application reaches from the root as of `tid`: the records, by oid."""
    found, todo = {}, [z64]
    while todo:
        oid = todo.pop()
        if oid in found:
            continue
        try:
            loaded = storage.loadBefore(oid, p64(u64(tid) + 1))
        except POSKeyError:
            loaded = None
        found[oid] = loaded and loaded[0]
        if loaded:
            todo.extend(bytes.fromhex(other) for other in followed(loaded[0]))
    return found


def moments(path, first, length=14):
    """What is reachable at each transaction from the one numbered `first` on."""
    storage = FileStorage(path, read_only=True)
    try:
        return [reachable(storage, tid_of(number)) for number in range(first, length)]
    finally:
        storage.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    rng, count, end = random.Random(options.seed), 0, time.monotonic() + options.seconds
    print("seed", options.seed, flush=True)
    with Scan() as scan:
        while time.monotonic() < end:
            compare(rng, scan)
            count += 1
    print("%d records, each whole and damaged: as ZODB" % count)


if __name__ == "__main__":
    main()
