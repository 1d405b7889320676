"""Compares what clients were told with what the nodes have, when all is over."""

import collections
import hashlib
import json
import random

import ZODB
import ZODB.FileStorage

from client import ACCOUNTS, COUNTERS, EACH

READS = ("look", "again")


class Log:
    """What one client wanted and was told."""

    def __init__(self, name, path):
        self.name = name
        self.tries, self.ends, self.violations = {}, {}, []
        with open(path) as file:
            for number, line in enumerate(file, 1):
                line = json.loads(line)
                if "try" in line:
                    assert line["try"] not in self.tries, (path, number)
                    self.tries[line["try"]] = line
                elif "violation" in line:
                    self.violations.append("%s: %s" % (name, line["violation"]))
                elif "outcome" in line:
                    self.ends[line["seq"]] = line

    def acknowledged(self):
        """(seq, what was tried, what was told) of commits."""
        for seq, end in self.ends.items():
            if end["outcome"] == "ok" and self.tries[seq]["kind"] not in READS:
                yield seq, self.tries[seq], end


def check_logs(logs):
    """What can be seen without the database."""
    found = [violation for log in logs for violation in log.violations]
    found += clients_go_forward(logs)
    fresh = [log for log in logs if log.fresh]
    found += an_acknowledged_count_is_seen(fresh)
    found += commits_are_in_the_order_of_time(fresh)
    return found


def clients_go_forward(logs):
    """No client sees a counter, or a last transaction, that is older than what it has seen."""
    for log in logs:
        counter, last = 0, ""
        for seq, end in sorted(log.ends.items()):
            if end.get("counter", counter) < counter:
                yield "%s went back from %d to %d in %d" % (log.name, counter, end["counter"], seq)
            if end["last"] < last:
                yield "%s went back from %s to %s in %d" % (log.name, last, end["last"], seq)
            counter, last = max(counter, end.get("counter", 0)), max(last, end["last"])


def an_acknowledged_count_is_seen(logs):
    """A transaction that begins after a commit was acknowledged, to whomever, sees it."""
    events = []
    for log in logs:
        for seq, told in log.ends.items():
            tried = log.tries[seq]
            if "counter" in told and told["outcome"] == "ok":
                events.append((tried["begin"], 0, told["counter"], log.name, seq))
        for seq, tried, told in log.acknowledged():
            if tried["kind"] == "count" and tried["what"] == [0]:
                events.append((told["end"], 1, told["counter"] + 1, log.name, seq))
    committed = 0
    for _, is_commit, value, name, seq in sorted(events):
        if is_commit:
            committed = max(committed, value)
        elif value < committed:
            yield "%s %d saw %d after %d was acknowledged" % (name, seq, value, committed)


def commits_are_in_the_order_of_time(logs):
    """A commit that begins after another was acknowledged has a later tid."""
    events = []
    for log in logs:
        for seq, tried, told in log.acknowledged():
            events.append((told["end"], 0, told["tid"], None))
            events.append((tried["begin"], 1, told["tid"], "%s %d" % (log.name, seq)))
    last = ""
    for _, begins, tid, who in sorted(events, key=lambda event: event[:3]):
        if not begins:
            last = max(last, tid)
        elif tid <= last:
            yield "%s got tid %s after %s was acknowledged" % (who, tid, last)


def check_database(path, blobs, logs):
    """One node's files against what clients were told."""
    found = []
    storage = ZODB.FileStorage.FileStorage(path, read_only=True, blob_dir=blobs)
    last = b""
    transactions = 0
    for txn in storage.iterator():
        transactions += 1
        if txn.tid <= last:
            found.append("transaction %s is not after %s" % (txn.tid.hex(), last.hex()))
        last = txn.tid
        for _ in txn:
            pass
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        root = connection.root()
        ledgers = {name: dict(ledger) for name, ledger in root["ledgers"].items()}
        for log in logs:
            found += ledger_is_what_was_told(log, ledgers.get(log.name, {}))
        found += state_is_what_ledgers_say(root, ledgers)
    db.close()
    return found, transactions


def ledger_is_what_was_told(log, ledger):
    for seq, tried, _ in log.acknowledged():
        if seq not in ledger:
            yield "%s %d (%s) was acknowledged and is not there" % (log.name, seq, tried["kind"])
    for seq, entry in ledger.items():
        tried = log.tries.get(seq)
        if tried is None or tuple(entry) != (tried["kind"], *tried["what"]):
            yield "%s %d is there as %r and was %r" % (log.name, seq, entry, tried)
        elif seq in log.ends and log.ends[seq]["outcome"] == "refused":
            yield "%s %d was refused (%s) and is there" % (log.name, seq, log.ends[seq]["error"])


def state_is_what_ledgers_say(root, ledgers):
    """No update is lost, none comes twice."""
    amounts = dict.fromkeys(range(ACCOUNTS), EACH)
    counters = dict.fromkeys(range(COUNTERS), 0)
    length, journal, blobs = 0, collections.Counter(), {}
    for name, ledger in ledgers.items():
        for seq, (kind, *what) in sorted(ledger.items()):
            if kind == "transfer":
                giver, taker, amount = what
                amounts[giver] -= amount
                amounts[taker] += amount
            elif kind == "count":
                counters[what[0]] += 1
            elif kind == "length":
                length += 1
            elif kind == "journal":
                journal[name, seq] += 1
            elif kind == "blob":
                blobs["%s %d" % (name, what[0])] = what[1:]
    there = {number: account["amount"] for number, account in root["accounts"].items()}
    if there != amounts:
        yield "the accounts are %s, and should be %s" % (there, amounts)
    there = {number: counter["value"] for number, counter in root["counters"].items()}
    if there != counters:
        yield "the counters are %s, and should be %s" % (there, counters)
    if root["length"]() != length:
        yield "the length is %d, and should be %d" % (root["length"](), length)
    entries = [tuple(entry) for entry in root["journal"].values()]
    if collections.Counter(entries) != journal:
        wrong = (journal - collections.Counter(entries)) + (collections.Counter(entries) - journal)
        yield "the journal and the ledgers differ: %s" % dict(wrong)
    if list(root["journal"].keys()) != list(range(len(entries))):
        yield "the journal has gaps"
    for name in ledgers:
        own = [seq for who, seq in entries if who == name]
        if own != sorted(own):
            yield "the journal is not in the order of %s" % name
    if set(root["blobs"]) != set(blobs):
        yield "the blobs are %s, and should be %s" % (sorted(root["blobs"]), sorted(blobs))
    for name, (seed, size) in blobs.items():
        if name not in root["blobs"]:
            continue
        data = random.Random(seed).randbytes(size)
        blob, digest = root["blobs"][name]
        with blob.open() as file:
            if file.read() != data or digest != hashlib.sha256(data).hexdigest():
                yield "blob %s is not what was written last" % name


def current(path):
    """What is current in a data file: oid, tid, data."""
    storage = ZODB.FileStorage.FileStorage(path, read_only=True)
    records, following = {}, None
    while True:
        oid, tid, data, following = storage.record_iternext(following)
        records[oid] = tid, hashlib.sha256(data).digest()
        if following is None:
            storage.close()
            return records


def check_all(cluster, logs, counts):
    """All of it; returns what is wrong."""
    found = check_logs(logs)
    pictures = {}
    for node in cluster.nodes:
        wrong, transactions = check_database(node.data_file, node.blob_dir, logs)
        found += ["%s: %s" % (node.name, one) for one in wrong]
        counts["transactions in data files"] += transactions
        pictures[node.name] = current(node.data_file)
    first = cluster.nodes[0].name
    for name, picture in pictures.items():
        different = [oid.hex() for oid in picture.keys() | pictures[first].keys()
                     if picture.get(oid) != pictures[first].get(oid)]
        if different:
            found.append("%s and %s differ in %s" % (first, name, different[:20]))
    counts["acknowledged commits"] = sum(1 for log in logs for _ in log.acknowledged())
    ends = [end["outcome"] for log in logs for end in log.ends.values()]
    for outcome, number in collections.Counter(ends).items():
        counts["transactions of clients: " + outcome] = number
    return found
