"""How long a crowd of clients takes to commit again when its server dies: on three nodes, and on runzeo, which somebody
starts again at once. And what an idle client costs the server.

    python bench/crowd.py [--clients 500]

needs the program (cargo build --release) and a Python with ZEO. Each client is ZEO's own with a cache file of 1,000 objects, one
transaction behind when it connects for the first time. All of them commit once as soon as they can after the server was killed;
the time is that from the kill to each client's reply. They run in four processes on the machine of the server: whose time that
is, the processors' time of clients and of servers until the last reply says.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests"))

import conftest  # noqa: E402, F401  (quiet logs)
import cluster as harness  # noqa: E402
import ZODB  # noqa: E402
from commits import RunZeo  # noqa: E402
from loads import cpu_of  # noqa: E402
from persistent.mapping import PersistentMapping  # noqa: E402
from zeo_client import Client, is_passing, open_storage  # noqa: E402
from ZODB.Connection import TransactionMetaData  # noqa: E402
from ZODB.utils import z64  # noqa: E402

OBJECTS = 1000
PROCESSES = 4
PATIENCE = 120
CACHE = 4 << 20


def fill_cache(addresses, directory):
    """Makes the objects, and a cache file that has all of them and is one transaction behind."""
    client = Client(addresses)
    client.commit(lambda root: root.update(objects=[PersistentMapping(text="x" * 200) for _ in range(OBJECTS)]))
    seed = Client(addresses, client="seed", var=directory, cache_size=CACHE)
    assert sum(len(each["text"]) for each in seed.root["objects"]) == 200 * OBJECTS
    seed.close()
    client.commit(lambda root: root["objects"][0].update(text="y" * 200))
    client.close()
    return os.path.join(directory, "seed-1.zec")


def commit(storage, number):
    """Stores an object of its own; returns when it has the reply."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            storage.store(storage.new_oid(), z64, b"\x80\x02cpersistent\nPersistent\nq\x01.N.", "", transaction)
            storage.tpc_vote(transaction)
            storage.tpc_finish(transaction)
            return time.monotonic()
        except Exception as error:
            if not is_passing(error) or time.monotonic() > deadline:
                raise
            storage.tpc_abort(transaction)
            time.sleep(0.01)


def work(addresses, seed, first, count):
    """One process of the crowd: connects, says so, and commits when it is told to."""
    addresses = [tuple(address) for address in json.loads(addresses)]

    def connect(number):
        path = os.path.dirname(seed)
        shutil.copy(seed, os.path.join(path, "c%d-1.zec" % number))
        return open_storage(addresses, client="c%d" % number, var=path, cache_size=CACHE, wait_timeout=PATIENCE)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        storages = list(pool.map(connect, range(first, first + count)))
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(list(pool.map(commit, storages, range(count)))), flush=True)
    sys.stdin.readline()
    for storage in storages:
        storage.close()


def resident(process):
    """Kilobytes of memory of a process."""
    with open("/proc/%d/status" % process.pid) as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def processor_time(processes):
    """Seconds of processors that processes have used."""
    return sum(map(cpu_of, processes))


def measure(name, addresses, directory, server, die, clients):
    """`server` is a process, `die` has others take its place, and returns those."""
    seed = fill_cache(addresses, directory)
    before = resident(server)
    each = clients // PROCESSES
    crowd = []
    try:
        for number in range(PROCESSES):
            command = [sys.executable, __file__, "--work", json.dumps(addresses), seed, str(number * each), str(each)]
            crowd.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for process in crowd:
            assert process.stdout.readline() == "ready\n", "a part of the crowd does not come up"
        # What connecting has cost for a moment is given back.
        time.sleep(2)
        idle = (resident(server) - before) / clients
        began = time.monotonic()
        servers = die()
        of_clients, of_servers = processor_time(crowd), processor_time(servers)
        for process in crowd:
            process.stdin.write("go\n")
            process.stdin.flush()
        taken = sorted(reply - began for process in crowd for reply in json.loads(process.stdout.readline()))
        of_clients, of_servers = processor_time(crowd) - of_clients, processor_time(servers) - of_servers
        for process in crowd:
            process.stdin.close()
            process.wait(PATIENCE)
    finally:
        for process in crowd:
            process.kill()
            process.wait()
    print(
        "%-12s %4d clients: first %5.2f s, median %5.2f s, last %5.2f s after the kill; %3.0f kB for an idle client; "
        "processors: %4.1f s of the clients, %4.1f s of the server"
        % (name, len(taken), taken[0], statistics.median(taken), taken[-1], idle, of_clients, of_servers),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500, help="how many (500)")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        addresses, seed, first, count = options.work
        return work(addresses, seed, int(first), int(count))
    directory = tempfile.mkdtemp(prefix="standby-bench-")
    runzeo = RunZeo(os.path.join(directory, "runzeo"))
    cluster = harness.Cluster(os.path.join(directory, "cluster"))
    try:
        runzeo.start()
        os.mkdir(os.path.join(directory, "caches"))

        def restart():
            runzeo.kill()
            runzeo.start()
            return [runzeo.process]

        def lose():
            primary.kill()
            return [node.process for node in cluster.running()]

        caches = os.path.join(directory, "caches")
        measure("runzeo", [("127.0.0.1", runzeo.port)], caches, runzeo.process, restart, options.clients)
        runzeo.stop()
        shutil.rmtree(caches)
        os.mkdir(caches)
        cluster.start()
        primary = cluster.primary()
        measure("three nodes", cluster.addresses, caches, primary.process, lose, options.clients)
    finally:
        for server in [runzeo, *cluster.nodes]:
            server.kill()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
