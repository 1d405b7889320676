"""How fast a large blob goes in and out, how much memory the server needs for it, and how long
other commits wait meanwhile: Standby beside runzeo, in the same run.

    python bench/blobs.py [--megabytes 2048]

needs the program (cargo build --release) and a Python with ZEO, and five times that much room in the
directory for temporary files. The bytes are checked.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time

from ZODB.blob import Blob

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402
from commits import RunZeo  # noqa: E402
from zeo_client import Client  # noqa: E402

PIECE = os.urandom(1 << 20)


def memory(process):
    """The most memory that the process has had, in MB."""
    with open("/proc/%d/status" % process.pid) as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def write(blob, megabytes):
    digest = hashlib.sha256()
    with blob.open("w") as file:
        for number in range(megabytes):
            piece = PIECE[number % 1000 :]
            file.write(piece)
            digest.update(piece)
    return digest.digest()


def digest_of(blob):
    digest = hashlib.sha256()
    with blob.open("r") as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                return digest.digest()
            digest.update(piece)


def measure(servers, addresses, megabytes, directory):
    writer = Client(addresses, blob_dir=os.path.join(directory, "w"), wait_timeout=60)
    other = Client(addresses, wait_timeout=60)
    other.commit(lambda root: root.update(number=0))
    writer.manager.begin()
    # An object of its own, so that the other client's commits do not collide with it.
    blob = Blob()
    written = write(blob, megabytes)
    writer.connection.add(blob)
    stop, waits = threading.Event(), []

    def commit():
        number = 0
        while not stop.is_set():
            number += 1
            began = time.monotonic()
            other.commit(lambda root: root.update(number=number))
            waits.append(time.monotonic() - began)

    thread = threading.Thread(target=commit)
    thread.start()
    began = time.monotonic()
    writer.manager.commit()
    upload = time.monotonic() - began
    stop.set()
    thread.join()
    oid = blob._p_oid
    reader = Client(addresses, blob_dir=os.path.join(directory, "r"), wait_timeout=60)
    began = time.monotonic()
    again = reader.connection.get(oid)
    again.open("r").close()
    download = time.monotonic() - began
    assert digest_of(again) == written, "the blob has changed on its way"
    for client in (writer, other, reader):
        client.close()
    memories = [memory(server.process) for server in servers]
    for server in servers:
        server.stop()
    shutil.rmtree(os.path.join(directory, "w"))
    shutil.rmtree(os.path.join(directory, "r"))
    return upload, download, max(memories), max(waits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    started = []
    try:
        runzeo = RunZeo(os.path.join(directory, "runzeo"), blobs=True)
        node = harness.Node(os.path.join(directory, "alone"), blobs=True)
        cluster = harness.Cluster(os.path.join(directory, "cluster"), blobs=True)
        started = [runzeo, node, *cluster.nodes]
        rows = []
        for name, servers, addresses in [
            ("runzeo", [runzeo], ("127.0.0.1", runzeo.port)),
            ("Standby, one node", [node], node.address),
            ("Standby, three nodes", cluster.nodes, cluster.addresses),
        ]:
            if servers is cluster.nodes:
                cluster.start()
            else:
                servers[0].start()
            rows.append((name, measure(servers, addresses, options.megabytes, directory)))
            for server in servers:
                shutil.rmtree(server.directory)
    finally:
        for process in started:
            process.kill()
        shutil.rmtree(directory)
    print("one blob of %d MB, with one other client that commits meanwhile" % options.megabytes)
    columns = ("commit, MB/s", "load, MB/s", "memory, MB", "worst commit, ms")
    print("%-22s%14s%14s%14s%18s" % ("", *columns))
    for name, (upload, download, most, worst) in rows:
        rates = options.megabytes / upload, options.megabytes / download
        print("%-22s%14.0f%14.0f%14d%18.0f" % (name, *rates, most, worst * 1000))


if __name__ == "__main__":
    main()
