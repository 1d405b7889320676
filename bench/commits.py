"""Commits per second: Standby on one node and on three, beside runzeo, in the same run. Three nodes encrypt what they say
to each other if they share a secret.

    python bench/commits.py [--seconds 5]

needs the program (cargo build --release) and a Python with ZEO. The same client, `standby bench`,
drives all of them; the data files lie on the same file system.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402

CLIENTS = (1, 8, 32)


class RunZeo(harness.Process):
    """The Python server."""

    def __init__(self, directory, blobs=False):
        super().__init__(directory)
        blobs = "  blob-dir %s/blobs\n" % self.directory if blobs else ""
        self.port = harness.free_ports(1)[0]
        self.config_path = os.path.join(self.directory, "zeo.conf")
        with open(self.config_path, "w") as config:
            config.write(
                "<zeo>\n  address 127.0.0.1:%d\n  client-conflict-resolution true\n</zeo>\n"
                "<filestorage>\n  path %s/Data.fs\n%s</filestorage>\n"
                % (self.port, self.directory, blobs)
            )

    def command(self):
        return [sys.executable, "-m", "ZEO.runzeo", "-C", self.config_path]


def command_of(ports, clients, seconds):
    """Clients that commit for so long, and report as JSON."""
    command = [harness.STANDBY, "bench", "--json", "--clients", str(clients), "--seconds", str(seconds)]
    for port in ports:
        command += ["--at", "127.0.0.1:%d" % port]
    return command


def measure(ports, seconds):
    row = []
    for clients in CLIENTS:
        command = command_of(ports, clients, seconds)
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row.append(json.loads(output))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    started = []
    try:
        rows = []
        server = RunZeo(os.path.join(directory, "runzeo"))
        started.append(server.start())
        rows.append(("runzeo", measure([server.port], options.seconds)))
        server.stop()
        node = harness.Node(os.path.join(directory, "alone"))
        started.append(node.start())
        rows.append(("Standby, one node", measure([node.port], options.seconds)))
        node.stop()
        for name, secret in (("three nodes", False), ("with a secret", True)):
            cluster = harness.Cluster(os.path.join(directory, name.replace(" ", "-")), secret=secret)
            started.extend(cluster.nodes)
            cluster.start()
            ports = [n.port for n in cluster.nodes]
            rows.append(("Standby, %s" % name, measure(ports, options.seconds)))
            cluster.stop()
    finally:
        for process in started:
            process.kill()
        shutil.rmtree(directory)
    print("commits per second (median latency in ms), one object of 500 bytes each")
    print("%-22s" % "" + "".join("%20s" % ("%d client(s)" % n) for n in CLIENTS))
    for name, row in rows:
        cells = (
            "%d (%.2f)" % (one["transactions_per_s"], one["latency_us"]["p50"] / 1000)
            for one in row
        )
        print("%-22s" % name + "".join("%20s" % cell for cell in cells))


if __name__ == "__main__":
    main()
