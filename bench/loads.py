"""Loads per second, and the server's CPU for each: Standby beside runzeo, on several file systems in the same run.

    python bench/loads.py [--seconds 3] [DIRECTORY ...]

needs the program (cargo build --release) and a Python with ZEO. Without a DIRECTORY: a temporary one, and as root the same
disk through overlayfs (what a container without a volume writes to) and a tmpfs. All pages are in memory. One client asks
for random objects, fifty at a time.
"""

import argparse
import os
import pickle
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402
from commits import RunZeo  # noqa: E402
from zeo_client import make_database  # noqa: E402

OBJECTS = 5000
WINDOW = 50
NEWEST = b"\x7f" + b"\xff" * 7


def connected(port):
    try:
        return socket.create_connection(("127.0.0.1", port))
    except ConnectionRefusedError:
        return None


class RawClient:
    """ZEO's protocol without the work of a client, which would hide the server's."""

    def __init__(self, port):
        self.socket = harness.wait_for("a server", lambda: connected(port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb", 1 << 20)
        self.receive()
        self.socket.sendall(self.frame(b"Z5"))
        self.call(1, "register", "1", False)
        self.receive()

    @staticmethod
    def frame(message):
        return struct.pack(">I", len(message)) + message

    def call(self, number, method, *arguments):
        self.socket.sendall(self.frame(pickle.dumps((number, 0, method, arguments), 3)))

    def receive(self):
        (length,) = struct.unpack(">I", self.file.read(4))
        return self.file.read(length)

    def loads(self, seconds):
        """How many loads are answered, and in which time."""
        rng = random.Random(1)
        asked = answered = 0
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            batch = []
            while asked - answered < WINDOW:
                oid = struct.pack(">Q", rng.randrange(OBJECTS))
                asked += 1
                batch.append(self.frame(pickle.dumps((asked + 1, 0, "loadBefore", (oid, NEWEST)), 3)))
            self.socket.sendall(b"".join(batch))
            while asked - answered > WINDOW // 2:
                self.receive()
                answered += 1
        while answered < asked:
            self.receive()
            answered += 1
        return answered, time.monotonic() - began


def cpu_of(process):
    with open("/proc/%d/stat" % process.pid) as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server, seconds):
    server.start()
    try:
        client = RawClient(server.port)
        client.loads(seconds / 3)
        before = cpu_of(server.process)
        loads, took = client.loads(seconds)
        return loads / took, (cpu_of(server.process) - before) / loads * 1e6
    finally:
        server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("directories", nargs="*", metavar="DIRECTORY")
    options = parser.parse_args()
    made, mounted = tempfile.mkdtemp(prefix="standby-bench-"), []
    places = {directory: tempfile.mkdtemp(dir=directory) for directory in options.directories}
    try:
        if not places:
            plain, overlay, memory = (os.path.join(made, name) for name in ("plain", "overlay", "tmpfs"))
            for directory in (plain, overlay, memory, *(made + "/" + n for n in ("lower", "upper", "work"))):
                os.mkdir(directory)
            places["plain"] = plain
            if os.geteuid() == 0:
                lower, upper, work = (os.path.join(made, name) for name in ("lower", "upper", "work"))
                layers = "lowerdir=%s,upperdir=%s,workdir=%s" % (lower, upper, work)
                subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, overlay], check=True)
                mounted.append(overlay)
                subprocess.run(["mount", "-t", "tmpfs", "standby-bench", memory], check=True)
                mounted.append(memory)
                places.update(overlayfs=overlay, tmpfs=memory)
        print("loads per second (server's CPU for each in \u00b5s), one client, %d objects" % OBJECTS)
        print("%-24s%20s%20s" % ("", "runzeo", "Standby"))
        for name, place in places.items():
            server, node = RunZeo(os.path.join(place, "runzeo")), harness.Node(os.path.join(place, "alone"))
            make_database(os.path.join(server.directory, "Data.fs"), OBJECTS)
            shutil.copy(os.path.join(server.directory, "Data.fs"), node.data_file)
            cells = ["%d (%.0f)" % measure(one, options.seconds) for one in (server, node)]
            print("%-24s%20s%20s" % (name, *cells), flush=True)
    finally:
        for directory in mounted:
            subprocess.run(["umount", "-l", directory], check=False)
        for directory in [made, *(places[name] for name in options.directories)]:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
