"""How fast a new, empty node gets everything from the others.

    python bench/recovery.py [--seconds 10]

needs the program (cargo build --release). Databases of transactions with one object each are written for so
many seconds, object after object again and again; then a second node joins by normal and by fast recovery, once
with both on the disk, once with both in memory (/dev/shm). A fast recovery gets the last revision of each object only:
its rates are those of the history that it covers, in the time that it takes. Beside it: how fast the same disk takes
one long file that is synced at the end.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402

SIZES = (500, 10_000)
CAUGHT_UP = re.compile(r"everything has come.*?transactions=(\d+) bytes=(\d+) seconds=([\d.e-]+)")


def sequential_write(directory, size=512 << 20):
    """MB/s of a file written from beginning to end and synced."""
    path, block = os.path.join(directory, "sequential"), os.urandom(1 << 20)
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    os.remove(path)
    return size / seconds / 1e6


def recover(directory, database, recovery):
    """Transactions, bytes and seconds of a catch-up."""
    options = "  recovery %s\n" % recovery
    cluster = harness.Cluster(directory, count=2, options=options)
    try:
        shutil.copy(database, cluster.nodes[0].data_file)
        cluster.start()
        log = re.sub(r"\x1b\[[\d;]*m", "", cluster.nodes[1].log())
        transactions, count, seconds = CAUGHT_UP.search(log).groups()
        return int(transactions), int(count), float(seconds)
    finally:
        for node in cluster.nodes:
            node.kill()
        shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    memory = tempfile.mkdtemp(prefix="standby-bench-", dir="/dev/shm")
    nodes = []
    try:
        print("%-32s %12s %8s %8s %14s" % ("", "transactions", "MB", "MB/s", "transactions/s"))
        for size in SIZES:
            node = harness.Node(os.path.join(directory, "alone%d" % size))
            nodes.append(node.start())
            command = [harness.STANDBY, "bench", "--clients", "32", "--size", str(size)]
            command += ["--population", "50"]
            command += ["--at", "127.0.0.1:%d" % node.port, "--seconds", str(options.seconds)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            node.stop()
            for name, where in (("disk", directory), ("memory", memory)):
                for recovery in ("normal", "fast"):
                    place = os.path.join(where, "cluster")
                    sent, sent_bytes, seconds = recover(place, node.data_file, recovery)
                    if recovery == "normal":
                        covered, covered_bytes = sent, sent_bytes
                    row = sent, sent_bytes / 1e6, covered_bytes / 1e6 / seconds, covered / seconds
                    title = "%s, %s, %d bytes each" % (recovery, name, size)
                    print("%-32s %12d %8.0f %8.0f %14.0f" % (title, *row), flush=True)
        for name, where in (("disk", directory), ("memory", memory)):
            title = "%s, one long file" % name
            print("%-32s %12s %8s %8.0f" % (title, "", "", sequential_write(where)))
    finally:
        for node in nodes:
            node.kill()
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


if __name__ == "__main__":
    main()
