"""How long a client waits for its next commit when the primary goes away: the stock client with the addresses of all nodes,
with that of one node only, which is a replica then, and with that of `standby router`; and, if it is installed, the storage
of standby_zodb with one.

    python bench/clients.py [--rounds 10] [--changes kill stop switchover freeze vanish]

needs the program (cargo build --release) and a Python with ZEO; as root each node is in a network namespace of its own, and its
host can vanish: no connection is closed. One client commits in a loop on a cluster of three nodes. The time of a round is
that from the change to the next reply to a commit. "Errors" are the exceptions that the application sees; it tries again at
once. Who waits for more than 30 s is given up.
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import conftest  # noqa: E402, F401  (quiet logs)
import cluster as harness  # noqa: E402
import transaction  # noqa: E402
import ZODB  # noqa: E402
from places import Places  # noqa: E402
from zeo_client import is_passing, open_storage  # noqa: E402

try:
    import standby_zodb
except ImportError:
    standby_zodb = None

PATIENCE = 30


class Client:
    """Commits once; what hangs is left alone."""

    def __init__(self, storage):
        self.manager = transaction.TransactionManager()
        self.db = ZODB.DB(storage)
        self.connection = self.db.open(self.manager)

    def commit(self):
        """Commits until it has an answer; returns the errors before it."""
        errors = 0
        while True:
            try:
                self.manager.begin()
                root = self.connection.root()
                root["round"] = root.get("round", 0) + 1
                self.manager.commit()
                return errors
            except Exception as error:
                self.manager.abort()
                if not is_passing(error):
                    raise
                errors += 1
                time.sleep(0.005)

    def close(self):
        self.manager.abort()
        self.connection.close()
        self.db.close()


def next_commit(client, change):
    """The seconds from the change to the next reply to a commit, and the errors before it; None if nothing comes."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(client.commit()), daemon=True)
    begun = time.monotonic()
    change()
    thread.start()
    thread.join(PATIENCE)
    return (time.monotonic() - begun, seen[0]) if seen else None


def make_primary(cluster, node):
    """A node that has vanished again and again does not stand for a minute."""
    for attempt in range(25):
        try:
            return cluster.make_primary(node)
        except AssertionError:
            if attempt == 24:
                raise
            time.sleep(3)


def measure(world, cluster, make, change, rounds):
    waited, errors, client = [], 0, None
    for number in range(rounds):
        if client is None:
            client = Client(make())
        # Never the node whose address is the only one.
        primary = cluster.nodes[1 + number % 2]
        make_primary(cluster, primary)
        client.commit()
        changes = {
            "kill": primary.kill,
            "stop": primary.stop,
            "switchover": lambda: primary.ask("switchover"),
            "freeze": lambda: primary.signal(signal.SIGSTOP),
            "vanish": lambda: world.cut(primary.name),
        }
        result = next_commit(client, changes[change])
        if change == "vanish":
            world.heal(primary.name)
        if change == "freeze":
            primary.signal(signal.SIGCONT)
        if result is None:
            # It hangs: a new one takes its place.
            waited.append(PATIENCE)
            client = None
        else:
            waited.append(result[0])
            errors += result[1]
        if primary.process is None:
            primary.start()
        cluster.wait_healthy()
    if client is not None:
        client.close()
    return sorted(waited), errors


def run(world, cluster, router, options):
    cluster.start()
    router.start()
    one = cluster.addresses[:1]
    clients = {
        "ZEO, all nodes": lambda: open_storage(cluster.addresses, wait_timeout=PATIENCE),
        "ZEO, one node": lambda: open_storage(one, wait_timeout=PATIENCE),
        "ZEO, router": lambda: open_storage([router.writes], wait_timeout=PATIENCE),
    }
    if standby_zodb is not None:
        clients["standby_zodb, one node"] = lambda: standby_zodb.ClientStorage(
            one, wait_timeout=PATIENCE, server_sync=True
        )
    print("%-12s %-24s %9s %9s %9s  %s" % ("change", "client", "median", "best", "worst", "errors"))
    for change in options.changes:
        for name, make in clients.items():
            waited, errors = measure(world, cluster, make, change, options.rounds)
            figures = [
                "%.0f ms" % (1000 * t) if t < PATIENCE else "> %d s" % PATIENCE
                for t in (statistics.median(waited), waited[0], waited[-1])
            ]
            print("%-12s %-24s %9s %9s %9s  %d" % (change, name, *figures, errors), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = os.geteuid() == 0
    changes = ["kill", "stop", "switchover", "freeze"] + ["vanish"] * root
    parser.add_argument("--rounds", type=int, default=10, help="how often each change is made (10)")
    parser.add_argument("--changes", nargs="+", choices=changes, default=changes)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    world = Places(["office", "n1", "n2", "n3"]) if root else None
    cluster = harness.Cluster(os.path.join(directory, "cluster"), places=world)
    within = world.command("office") if world else ()
    router = harness.Router(os.path.join(directory, "router"), cluster.addresses[:1], within=within)
    try:
        if world:
            world.run("office", lambda: run(world, cluster, router, options))
        else:
            run(world, cluster, router, options)
    finally:
        router.kill()
        for node in cluster.nodes:
            node.kill()
        if world:
            world.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
