"""How long a pack takes, and how long commits wait meanwhile: Standby beside runzeo, in the same run.

    python bench/pack.py [--objects 100000]

needs the program (cargo build --release) and a Python with ZEO. Both pack the same database: each
object in two revisions, and as much garbage.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time

import transaction
import ZODB
import ZODB.FileStorage
import ZODB.FileStorage.FileStorage
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402
from commits import RunZeo  # noqa: E402
from zeo_client import Client  # noqa: E402


def make(path, objects):
    ZODB.FileStorage.FileStorage.fsync = None
    db = ZODB.DB(ZODB.FileStorage.FileStorage(path))
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    root = connection.root()
    for name in ("tree", "garbage"):
        tree = root[name] = OOBTree()
        for start in range(0, objects, 1000):
            for number in range(start, start + 1000):
                tree[number] = PersistentMapping(number=number, text="x" * 400)
            manager.commit()
            connection.cacheMinimize()
    for start in range(0, objects, 1000):
        for number in range(start, start + 1000):
            root["tree"][number]["number"] = -number
        manager.commit()
        connection.cacheMinimize()
    del root["garbage"]
    manager.commit()
    connection.close()
    db.close()


def measure(server, address, path):
    server.start()
    before = os.path.getsize(path)
    client = Client(address, wait_timeout=60)
    stop, waits = threading.Event(), []

    def write():
        writer = Client(address)
        number = 0
        while not stop.is_set():
            number += 1
            began = time.monotonic()
            writer.commit(lambda root: root.update(number=number))
            waits.append(time.monotonic() - began)
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(1)
    del waits[:]
    began = time.monotonic()
    client.db.pack()
    took = time.monotonic() - began
    stop.set()
    thread.join()
    client.close()
    server.stop()
    waits.sort()
    return took, before, os.path.getsize(path), waits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=100_000)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    started = []
    try:
        runzeo = RunZeo(os.path.join(directory, "runzeo"))
        node = harness.Node(os.path.join(directory, "alone"))
        started = [runzeo, node]
        path = os.path.join(runzeo.directory, "Data.fs")
        make(path, options.objects)
        shutil.copy(path, node.data_file)
        rows = [
            ("runzeo", measure(runzeo, ("127.0.0.1", runzeo.port), path)),
            ("Standby, one node", measure(node, node.address, node.data_file)),
        ]
    finally:
        for process in started:
            process.kill()
        shutil.rmtree(directory)
    print("a pack of %d objects beside one writing client" % options.objects)
    print("%-20s%10s%16s%10s%18s" % ("", "seconds", "MB", "commits", "ms: median, worst"))
    for name, (took, before, after, waits) in rows:
        sizes = "%d -> %d" % (before >> 20, after >> 20)
        commit = "%.1f, %.1f" % (waits[len(waits) // 2] * 1000, waits[-1] * 1000)
        print("%-20s%10.1f%16s%10d%18s" % (name, took, sizes, len(waits), commit))


if __name__ == "__main__":
    main()
