"""One transaction of very many objects beside small ones: Standby on one node and on three, beside runzeo.

    python bench/large.py [--objects 300000]

needs the program (cargo build --release) and a Python with ZEO. One client imports; eight others (`standby bench`) commit
small objects as long as that takes, then beside another import.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "tests")]

import cluster as harness  # noqa: E402
from commits import RunZeo, command_of  # noqa: E402
from large import commit_many  # noqa: E402
from zeo_client import open_storage  # noqa: E402

FIRST = 1 << 32


def resident(process):
    """Megabytes of memory of a process at most, and now."""
    with open("/proc/%d/status" % process.process.pid) as file:
        lines = dict(line.split(":", 1) for line in file)
    return [int(lines[name].split()[0]) >> 10 for name in ("VmHWM", "VmRSS")]


def small(ports, seconds):
    """What small commits take, in eight clients."""
    return subprocess.Popen(command_of(ports, 8, seconds), stdout=subprocess.PIPE, text=True)


def told(process):
    output = process.communicate()[0]
    if process.returncode:
        return "small commits ended with an error"
    found = json.loads(output)
    latency = [found["latency_us"][name] / 1000 for name in ("p50", "p99", "max")]
    return "%6d small commits/s, p50 %.1f ms, p99 %.1f ms, longest %.0f ms" % (found["transactions_per_s"], *latency)


def measure(ports, server, objects):
    address = ("127.0.0.1", ports[0])
    open_storage(address).close()
    began = time.monotonic()
    commit_many(address, range(FIRST, FIRST + objects))
    takes = time.monotonic() - began
    print("  alone:   %.1f s for %d objects" % (takes, objects), flush=True)
    print("  without: %s" % told(small(ports, takes)), flush=True)
    beside = small(ports, 1.5 * takes)
    times = commit_many(address, range(FIRST << 8, (FIRST << 8) + objects))
    print("  during:  %s" % told(beside))
    print("           stores %.1f s, vote %.1f s, end %.1f s" % tuple(times))
    print("  memory of the server: %d MB at most, %d MB now" % tuple(resident(server)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=300_000)
    parser.add_argument("--only", choices=["runzeo", "one", "three"], help="one of the servers")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    started = []
    try:
        for name, title, make in (("runzeo", "runzeo", RunZeo), ("one", "Standby, one node", harness.Node)):
            if options.only in (None, name):
                print(title, flush=True)
                server = make(os.path.join(directory, name))
                started.append(server.start())
                measure([server.port], server, options.objects)
                server.stop()
        if options.only in (None, "three"):
            print("Standby, three nodes", flush=True)
            cluster = harness.Cluster(os.path.join(directory, "cluster"))
            started.extend(cluster.nodes)
            cluster.start()
            primary = cluster.primary()
            ports = [primary.port] + [node.port for node in cluster.nodes if node is not primary]
            term = cluster.status()["term"]
            measure(ports, primary, options.objects)
            print("  elections: %d" % (cluster.status()["term"] - term))
    except BaseException:
        for process in started:
            print("\n".join(line for line in process.log().splitlines() if " INFO " not in line), file=sys.stderr)
        raise
    finally:
        for process in started:
            process.kill()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
