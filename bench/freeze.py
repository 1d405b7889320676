"""How long stock clients wait when the primary's process is frozen.

    python bench/freeze.py [--rounds 5]

needs the program (cargo build --release). A client commits again and again; the primary is stopped by SIGSTOP, so
nobody closes the client's connection; printed is the time to its next commit, with `serve --supervise` and
without. A stock client sets no time limit on what it asks for.
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
from zeo_client import Client  # noqa: E402

# Without a supervisor there is an end to the waiting too.
PATIENCE = 15


def process(node):
    """The node's own process, which may be a supervisor's child."""
    pid = node.process.pid
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return int((file.read().split() or [pid])[0])


def freeze(cluster, count):
    """Seconds from SIGSTOP to a commit; None if there was none."""
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(count=count))
    pid = process(cluster.primary())
    done = threading.Event()

    def commit():
        try:
            client.commit(lambda root: root.update(count=-count))
            done.set()
        finally:
            client.close()

    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    thread = threading.Thread(target=commit)
    thread.start()
    committed = done.wait(PATIENCE)
    seconds = time.monotonic() - started
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
    thread.join()
    cluster.wait_healthy()
    return seconds if committed else None


def measure(rounds, arguments):
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    cluster = harness.Cluster(directory, arguments=arguments)
    try:
        cluster.start()
        return [freeze(cluster, count) for count in range(1, rounds + 1)]
    finally:
        for node in cluster.nodes:
            node.kill()
        shutil.rmtree(directory, ignore_errors=True)


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
    found = measure(1, [])[0]
    what = "none within %d s" % PATIENCE if found is None else "after %.2f s" % found
    print("not supervised: next commit %s" % what)


if __name__ == "__main__":
    main()
