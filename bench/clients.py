"""How long a stock client waits for its next commit when the primary goes away: with the addresses of all nodes, and with
that of one node only, which is a replica then.

    python bench/clients.py [--rounds 10] [--changes kill switchover stop]

needs the program (cargo build --release) and a Python with ZEO. One client commits in a loop on a cluster of three
nodes. The time of a round is that from the change to the next reply to a commit. "Errors" are the exceptions that the
application sees; it tries again at once.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import conftest  # noqa: E402, F401  (quiet logs)
import cluster as harness  # noqa: E402
from zeo_client import Client, is_passing  # noqa: E402

# What happens to the primary; how it is there again.
CHANGES = {
    "kill": lambda node: node.kill(),
    "switchover": lambda node: node.ask("switchover"),
    "stop": lambda node: node.stop(),
}


def next_commit(client, change):
    """The seconds from the change to the next reply to a commit, and the errors before it."""
    began, errors = time.monotonic(), 0
    change()
    while True:
        try:
            client.manager.begin()
            client.root["round"] = client.root.get("round", 0) + 1
            client.manager.commit()
            return time.monotonic() - began, errors
        except Exception as error:
            client.manager.abort()
            if not is_passing(error):
                raise
            errors += 1


def measure(cluster, addresses, change, rounds):
    waited, errors = [], 0
    client = Client(addresses, wait_timeout=60)
    client.commit(lambda root: root.update(round=0))
    for number in range(rounds):
        # Never the node whose address is the only one.
        primary = cluster.nodes[1 + number % 2]
        cluster.make_primary(primary)
        client.commit(lambda root: root.update(round=0))
        seconds, seen = next_commit(client, lambda: CHANGES[change](primary))
        waited.append(seconds)
        errors += seen
        if primary.process is None:
            primary.start()
        cluster.wait_healthy()
    client.close()
    return sorted(waited), errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often each change is made (10)")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    cluster = harness.Cluster(os.path.join(directory, "cluster"))
    print("%-12s %-16s %8s %8s %8s  %s" % ("change", "addresses", "median", "best", "worst", "errors"))
    try:
        cluster.start()
        for change in options.changes:
            for known, addresses in (("all nodes", cluster.addresses), ("one node", cluster.addresses[:1])):
                waited, errors = measure(cluster, addresses, change, options.rounds)
                figures = tuple(1000 * t for t in (statistics.median(waited), waited[0], waited[-1]))
                print("%-12s %-16s %5.0f ms %5.0f ms %5.0f ms  %d" % (change, known, *figures, errors), flush=True)
    finally:
        for node in cluster.nodes:
            node.kill()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
