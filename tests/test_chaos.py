"""The checker of tests/chaos finds what it is there for."""

import hashlib
import io
import json
import os
import random
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "chaos"))

import checker  # noqa: E402
from client import ACCOUNTS, COUNTERS, EACH  # noqa: E402


class Blob(bytes):
    def open(self):
        return io.BytesIO(self)


class Told:
    """Two clients, what they were told, and what is there; all is well at first."""

    def __init__(self, directory):
        self.directory = directory
        self.lines = {"a": [], "b": []}
        self.ledgers = {"a": {}, "b": {}}
        self.root = {
            "accounts": {number: {"amount": EACH} for number in range(ACCOUNTS)},
            "counters": {number: {"value": 0} for number in range(COUNTERS)},
            "length": lambda: 1,
            "journal": {0: ("b", 2)},
            "blobs": {"a 0": (Blob(random.Random(5).randbytes(10)), self.digest(5))},
        }
        self.root["accounts"][0]["amount"] -= 7
        self.root["accounts"][1]["amount"] += 7
        self.root["counters"][0]["value"] = 2
        self.add("a", 1, "count", [0], 10, 11, tid="01", counter=0)
        self.add("a", 2, "transfer", [0, 1, 7], 12, 13, tid="02", counter=1)
        self.add("b", 1, "count", [0], 14, 15, tid="03", counter=1)
        self.add("b", 2, "journal", [], 16, 17, tid="04", counter=2)
        self.add("a", 3, "length", [], 16, 18, tid="05", counter=2)
        self.add("a", 4, "blob", [0, 5, 10], 20, 21, tid="06", counter=2)
        self.add("a", 5, "transfer", [0, 1, 1], 22, 23, outcome="refused", counter=2)
        self.add("a", 6, "transfer", [0, 1, 1], 24, 25, outcome="unknown", counter=2)
        self.add("b", 3, "look", [], 26, 27, counter=2)

    def digest(self, seed):
        return hashlib.sha256(random.Random(seed).randbytes(10)).hexdigest()

    def add(self, name, seq, kind, what, begin, end, outcome="ok", tid=None, counter=0):
        tried = {"try": seq, "kind": kind, "what": what, "begin": begin}
        told = dict(seq=seq, end=end, outcome=outcome, error=None, tid=tid, counter=counter)
        told["last"] = tid or (self.lines[name][-1]["last"] if self.lines[name] else "")
        self.lines[name] += [tried, told]
        if outcome == "ok" and kind not in checker.READS:
            self.ledgers[name][seq] = (kind, *what)

    def told(self, name, seq):
        return next(line for line in self.lines[name] if line.get("seq") == seq)

    def found(self):
        logs = []
        for name, lines in self.lines.items():
            path = os.path.join(self.directory, name + ".log")
            with open(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            log = checker.Log(name, path)
            log.fresh = True
            logs.append(log)
        found = checker.check_logs(logs)
        for log in logs:
            found += checker.ledger_is_what_was_told(log, self.ledgers[log.name])
        return found + list(checker.state_is_what_ledgers_say(self.root, self.ledgers))


@pytest.fixture
def told(tmp_path):
    return Told(tmp_path)


def test_nothing_is_found_where_nothing_is_wrong(told):
    assert told.found() == []
    # An outcome that nobody knows may be either.
    told.ledgers["a"][6] = ("transfer", 0, 1, 1)
    told.root["accounts"][0]["amount"] -= 1
    told.root["accounts"][1]["amount"] += 1
    assert told.found() == []


def test_a_client_that_was_killed_leaves_a_try(told):
    told.lines["b"].append({"try": 4, "kind": "length", "what": [], "begin": 28})
    assert told.found() == []
    told.ledgers["b"][4] = ("length",)
    told.root["length"] = lambda: 2
    assert told.found() == []


def lost(told):
    del told.ledgers["b"][2]
    told.root["journal"].clear()


def phantom(told):
    told.ledgers["b"][9] = ("length",)
    told.root["length"] = lambda: 2


def other(told):
    told.ledgers["a"][4] = ("blob", 0, 6, 10)
    told.root["blobs"]["a 0"] = (Blob(random.Random(6).randbytes(10)), told.digest(6))


def refused(told):
    told.ledgers["a"][5] = ("transfer", 0, 1, 1)
    told.root["accounts"][0]["amount"] -= 1
    told.root["accounts"][1]["amount"] += 1


def lost_update(told):
    told.root["accounts"][1]["amount"] -= 7


def lost_count(told):
    told.root["counters"][0]["value"] = 1


def wrong_length(told):
    told.root["length"] = lambda: 2


def twice(told):
    told.root["journal"][1] = ("b", 2)


def gap(told):
    told.root["journal"] = {1: ("b", 2)}


def blob(told):
    told.root["blobs"]["a 0"] = (Blob(b"0123456789"), told.digest(5))


def stale(told):
    told.told("b", 1)["counter"] = 0


def backwards(told):
    told.told("a", 6)["counter"] = 1


def last_backwards(told):
    told.told("a", 6)["last"] = "05"


def tids(told):
    told.told("b", 1)["tid"] = "02"


def violation(told):
    told.lines["b"].append({"violation": "the sum of the accounts is 3", "seq": 3})


@pytest.mark.parametrize(
    "change, words",
    [
        (lost, "b 2 (journal) was acknowledged and is not there"),
        (phantom, "b 9 is there as ('length',) and was None"),
        (other, "a 4 is there as ('blob', 0, 6, 10) and was"),
        (refused, "a 5 was refused (None) and is there"),
        (lost_update, "the accounts are"),
        (lost_count, "the counters are"),
        (wrong_length, "the length is 2, and should be 1"),
        (twice, "the journal and the ledgers differ"),
        (gap, "the journal has gaps"),
        (blob, "blob a 0 is not what was written last"),
        (stale, "b 1 saw 0 after 1 was acknowledged"),
        (backwards, "a went back from 2 to 1 in 6"),
        (last_backwards, "a went back from 06 to 05 in 6"),
        (tids, "b 1 got tid 02 after 02 was acknowledged"),
        (violation, "the sum of the accounts is 3"),
    ],
)
def test_it_is_found(told, change, words):
    change(told)
    assert any(words in one for one in told.found()), told.found()
