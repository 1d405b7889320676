"""How fast a new, empty node gets everything from the others.

    python bench/recovery.py [--seconds 10]

needs the program (cargo build --release). A database of small transactions is written for so many
seconds; then a second node joins, once with both on the disk, once with both in memory (/dev/shm). Beside it: how
fast the same disk takes one long file that is synced at the end.
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


def recover(directory, database):
    cluster = harness.Cluster(directory, count=2)
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
    alone = harness.Node(os.path.join(directory, "alone"))
    try:
        alone.start()
        command = [harness.STANDBY, "bench", "--clients", "32", "--at", "127.0.0.1:%d" % alone.port]
        command += ["--seconds", str(options.seconds)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        alone.stop()
        print("%-22s %12s %8s %10s %14s" % ("", "transactions", "MB", "MB/s", "transactions/s"))
        for name, where in (("normal, on disk", directory), ("normal, in memory", memory)):
            found = recover(os.path.join(where, "cluster"), alone.data_file)
            transactions, count, seconds = found
            row = name, transactions, count / 1e6, count / 1e6 / seconds, transactions / seconds
            print("%-22s %12d %8.1f %10.1f %14.0f" % row, flush=True)
        for name, where in (("the disk, one file", directory), ("memory, one file", memory)):
            print("%-22s %12s %8s %10.1f" % (name, "", "", sequential_write(where)))
    finally:
        alone.kill()
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


if __name__ == "__main__":
    main()
