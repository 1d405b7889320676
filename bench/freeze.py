"""How long stock clients wait when the primary's process is frozen.

    python bench/freeze.py [--rounds 5]

needs the program (cargo build --release). Each node is in a network namespace of its own, and the client in another,
if root runs it; otherwise all are on one machine, and none can be cut off. A client commits again and again; the primary is stopped by SIGSTOP, so nobody closes the client's
connection; printed is the time to its next commit, with `serve --supervise` and without; and, with it, when the
primary's machine is cut off in the same moment. A stock client sets no time limit on what it asks for.
"""

import argparse
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402
from places import Places  # noqa: E402
from zeo_client import Client  # noqa: E402

# Without a supervisor there is an end to the waiting too.
PATIENCE = 15
APART = os.geteuid() == 0


def process(node):
    """The node's own process, which may be a supervisor's child."""
    pid = node.process.pid
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return int((file.read().split() or [pid])[0])


class Apart(harness.Cluster):
    """Each node in a place that has its name."""

    @staticmethod
    def place(places, group, number):
        name = "n%d" % number
        ports = [base + number for base in (8100, 8200, 8300, 8400)]
        return dict(host=places.hosts[name], within=places.command(name), ports=ports)


def freeze(world, cluster, count, cut):
    """Seconds from SIGSTOP to a commit; None if there was none."""
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(count=count))
    primary = cluster.primary()
    pid = process(primary)
    done = threading.Event()

    def commit():
        try:
            client.commit(lambda root: root.update(count=-count))
            done.set()
        finally:
            client.close()

    os.kill(pid, signal.SIGSTOP)
    if cut:
        world.cut(primary.name)
    started = time.monotonic()
    thread = threading.Thread(target=commit)
    thread.start()
    committed = done.wait(PATIENCE)
    seconds = time.monotonic() - started
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
    if cut:
        world.heal(primary.name)
    thread.join()
    cluster.wait_healthy()
    return seconds if committed else None


def measure(rounds, arguments, cut=False):
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    world = Places(["office", "n1", "n2", "n3"]) if APART else None
    found = []

    def within():
        kind = Apart if APART else harness.Cluster
        cluster = kind(directory, places=world, arguments=arguments)
        try:
            cluster.start()
            for count in range(1, rounds + 1):
                found.append(freeze(world, cluster, count, cut))
        finally:
            for node in cluster.nodes:
                node.kill()

    try:
        world.run("office", within) if APART else within()
        return found
    finally:
        if APART:
            world.close()
        shutil.rmtree(directory, ignore_errors=True)


def told(found):
    return "none within %d s" % PATIENCE if found is None else "after %.2f s" % found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = measure(options.rounds, ["--supervise"])
    print(
        "supervised, frozen after 2 s: next commit after %.2f s in the median, %.2f s at worst (%d rounds)"
        % (statistics.median(found), max(found), len(found))
    )
    print("not supervised: next commit %s" % told(measure(1, [])[0]))
    if not APART:
        return
    print("supervised, and cut off: next commit %s" % told(measure(1, ["--supervise"], cut=True)[0]))


if __name__ == "__main__":
    main()
