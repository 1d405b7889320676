"""Commits through standby_zodb while the primary is killed again and again: is any outcome ambiguous?

    python tests/kills.py [--commits 10000] [--clients 4] [--every 2.5]

Three nodes on this machine; clients that each count in an object of their own, without a pause; and every few
seconds the primary is killed, and started again when another node has taken over. In the end each count is compared
with what its client was told, and the data file of each node, as Python's FileStorage reads it, with the names of
the transactions: each is there once. The exit status is 1 if anything is wrong.
"""

import argparse
import collections
import logging
import shutil
import sys
import tempfile
import threading
import time

import cluster as harness
import conftest  # noqa: F401 (quiet logs)
from persistent.mapping import PersistentMapping
from standby_zodb import NotCommittedError, OutcomeUnknownError
from test_standby_zodb import Follower
from zeo_client import RETRY, is_passing, transactions


class Asked(logging.Handler):
    """Counts what the package says of commits that were under way."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.said = collections.Counter()

    def emit(self, record):
        if "a commit was under way" in record.msg:
            self.said["succeeded" if "succeeded" in record.msg else "not there"] += 1


class Counter(threading.Thread):
    """A client that counts."""

    def __init__(self, name, addresses, stop):
        super().__init__(name=name, daemon=True)
        self.site = Follower(addresses, wait_timeout=60)
        self.stop = stop
        self.told = 0
        self.errors = collections.Counter()

    def run(self):
        while not self.stop.is_set():
            self.once()

    def once(self):
        manager = self.site.manager
        try:
            manager.begin()
            count = self.site.root[self.name]
            if count["n"] != self.told:
                self.errors["WRONG: it counts %d, its client was told %d" % (count["n"], self.told)] += 1
                self.told = count["n"]
            count["n"] += 1
            manager.get().note("%s %d" % (self.name, count["n"]))
            manager.commit()
            self.told += 1
            return
        except (NotCommittedError, OutcomeUnknownError) as error:
            self.errors[type(error).__name__] += 1
        except (*RETRY, AttributeError) as error:
            if not is_passing(error):
                raise
            self.errors["before the commit: " + type(error).__name__] += 1
        manager.abort()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=10000, help="so many, of all clients (10000)")
    parser.add_argument("--clients", type=int, default=4, help="so many clients (4)")
    parser.add_argument("--every", type=float, default=2.5, help="seconds between two kills (2.5)")
    args = parser.parse_args()
    logging.getLogger("txn").setLevel(logging.CRITICAL + 1)
    asked = Asked()
    logging.getLogger("standby_zodb").addHandler(asked)
    logging.getLogger("standby_zodb").setLevel(logging.INFO)
    directory = tempfile.mkdtemp(prefix="kills")
    cluster = harness.Cluster(directory)
    try:
        wrong = run(cluster.start(), args, asked)
    finally:
        for node in cluster.nodes:
            node.kill()
    if wrong:
        print("\n".join(["", *wrong, "files: " + directory]))
        return 1
    shutil.rmtree(directory)
    print("\nnone was ambiguous, none is there twice, none is lost")
    return 0


def run(cluster, args, asked):
    stop, kills, begun = threading.Event(), 0, time.monotonic()
    clients = [Counter("c%d" % n, cluster.addresses[:1], stop) for n in range(args.clients)]
    for client in clients:
        client.site.commit(lambda root: root.update({client.name: PersistentMapping(n=0)}))
    for client in clients:
        client.start()
    while sum(client.told for client in clients) < args.commits:
        if not all(client.is_alive() for client in clients):
            break
        time.sleep(args.every)
        killed = cluster.primary()
        killed.kill()
        kills += 1
        cluster.primary()
        killed.start()
        cluster.wait_healthy()
    seconds = time.monotonic() - begun
    alive = [client.is_alive() for client in clients]
    stop.set()
    for client in clients:
        client.join(120)
        client.site.close()
    cluster.wait_level()
    cluster.stop()
    errors = sum((client.errors for client in clients), collections.Counter())
    told = sum(client.told for client in clients)
    print("%d commits of %d clients in %.0f s, %d times the primary was killed" % (told, len(clients), seconds, kills))
    print("%7d commits were under way, and had succeeded" % asked.said["succeeded"])
    print("%7d were under way, and are not there" % asked.said["not there"])
    for error, count in sorted(errors.items()):
        print("%7d %s" % (count, error))
    wrong = [error for error in errors if error.startswith(("WRONG", "OutcomeUnknown"))]
    wrong += ["a client has ended"] * (not all(alive))
    for node in cluster.nodes:
        names = collections.Counter(t[3].decode() for t in transactions(node.data_file))
        expected = {"%s %d" % (client.name, n) for client in clients for n in range(1, client.told + 1)}
        there = {name for name in names if name.startswith("c")}
        twice = [name for name in there if names[name] > 1]
        for what, which in (("twice", twice), ("lost", expected - there), ("not told", there - expected)):
            if which:
                wrong.append("%s: %d %s, such as %s" % (node.name, len(which), what, min(which)))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
