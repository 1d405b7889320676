"""How long commits pause when another node becomes primary by command, when the primary is stopped by SIGTERM, and when it
is killed; and what the application sees of it.

    python bench/switchover.py [--rounds 30]

needs the program (cargo build --release) and a Python with ZEO. Four stock clients commit in a loop on a
cluster of three nodes. The pause of a round is the longest time between two replies to commits, whoever
got them, from the command (or the kill) on. "Tried again" is what transaction.attempts does silently; "errors" are
the exceptions that reach the application all the same.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import conftest  # noqa: E402, F401  (quiet logs)
import cluster as harness  # noqa: E402
from persistent.mapping import PersistentMapping  # noqa: E402
from zeo_client import Client  # noqa: E402

CLIENTS = 4


class Committer(threading.Thread):
    """Commits in a loop, as an application does that tries transient errors again."""

    def __init__(self, addresses, name):
        super().__init__(daemon=True)
        self.client, self.name = Client(addresses), name
        self.replies, self.tried, self.errors, self.ending = [], 0, [], False
        # An object of its own: a conflict would be tried again too.
        self.client.commit(lambda root: root.update({name: PersistentMapping()}))
        self.start()

    def run(self):
        while not self.ending:
            try:
                for attempt in self.client.manager.attempts(100):
                    self.tried += 1
                    with attempt:
                        self.client.root[self.name].update(number=self.tried)
                self.replies.append(time.monotonic())
            except Exception as error:
                self.errors.append(type(error).__name__)
                self.client.manager.abort()

    @property
    def again(self):
        return self.tried - len(self.replies) - len(self.errors)


def measure(cluster, committers, rounds, change):
    pauses = []
    for _ in range(rounds):
        primary = cluster.primary()
        started = time.monotonic()
        change(primary)
        time.sleep(1)
        # The pause may be longer than that.
        harness.wait_for("a commit", lambda: any(t > time.monotonic() - 0.5 for c in committers for t in c.replies[-1:]))
        replies = sorted(t for c in committers for t in c.replies if t >= started - 0.1)
        times = [t for t in replies if t < started][-1:] + [t for t in replies if t >= started]
        pauses.append(max(b - a for a, b in zip(times, times[1:])) * 1000)
        if primary.process is None:
            primary.start()
        cluster.wait_healthy()
    return sorted(pauses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    cluster = harness.Cluster(directory)
    try:
        cluster.start()
        committers = [Committer(cluster.addresses, "c%d" % n) for n in range(CLIENTS)]
        time.sleep(1)
        print("write pause in ms over %d rounds, %d clients" % (options.rounds, CLIENTS))
        print("%-12s %8s %8s %12s   %s" % ("", "median", "worst", "tried again", "errors"))
        changes = [
            ("switchover", lambda primary: primary.ask("switchover")),
            ("SIGTERM", lambda primary: primary.stop()),
            ("kill", lambda primary: primary.kill()),
        ]
        for name, change in changes:
            before = sum(c.again for c in committers)
            seen = {c: len(c.errors) for c in committers}
            pauses = measure(cluster, committers, options.rounds, change)
            again = sum(c.again for c in committers) - before
            errors = collections.Counter(e for c in committers for e in c.errors[seen[c] :])
            errors = ", ".join("%d %s" % (count, error) for error, count in errors.items()) or "none"
            median, worst = pauses[len(pauses) // 2], pauses[-1]
            print("%-12s %8.0f %8.0f %12d   %s" % (name, median, worst, again, errors), flush=True)
        for committer in committers:
            committer.ending = True
        for committer in committers:
            committer.join(10)
    finally:
        for node in cluster.nodes:
            node.kill()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
