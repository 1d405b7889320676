"""Power fails for all nodes at once, at random moments: only what was synced is there afterwards.

The nodes run in a program of their own (crates/node/examples/unplugged.rs), which is the real node on a disk that
forgets. STANDBY_POWER_ROUNDS says how often; ./check does with a few.
"""

import os
import random
import signal
import threading
import time

import pytest
import ZODB
import ZODB.FileStorage
from BTrees.LOBTree import LOBTree

import cluster as harness
from test_cluster import Writer
from zeo_client import RETRY, Client, transactions

UNPLUGGED = os.path.join(os.path.dirname(harness.STANDBY), "examples", "unplugged")
ROUNDS = int(os.environ.get("STANDBY_POWER_ROUNDS", "8"))


def unplugged(node):
    """Its command from now on."""
    node.command = lambda: [UNPLUGGED, "-C", node.config_path]
    return node


class Appender(Writer):
    """Each commit leaves something that a pack does not remove."""

    def run(self):
        try:
            while not self.stopping.is_set():
                number = len(self.acknowledged)

                def add(root):
                    if self.name not in root["writers"]:
                        root["writers"][self.name] = LOBTree()
                    root["writers"][self.name][number] = self.name

                self.client.commit(add, attempts=10000)
                self.acknowledged.append((self.name, number))
        except Exception as error:  # pragma: no cover
            self.error = error


def pull(nodes):
    for node in nodes:
        node.signal(signal.SIGUSR1)
    for node in nodes:
        status = node.wait()
        assert status == 99, (status, node.log()[-3000:])


def pack(client):
    try:
        client.db.pack()
    except RETRY:
        pass


@pytest.mark.parametrize("recovery", ["normal", "fast"])
def test_row_42_all_nodes_lose_power_at_random_moments(nodes, recovery):
    seed = int(os.environ.get("STANDBY_SEED", time.time()))
    print("STANDBY_SEED=%d" % seed)
    chance = random.Random(seed)
    cluster = nodes.cluster(options="  log-tail 1MB\n  recovery %s\n" % recovery)
    for node in cluster.nodes:
        unplugged(node)
    cluster.start()
    writers = [Appender(cluster.addresses, "w%d" % n) for n in range(3)]
    packer = Client(cluster.addresses, wait_timeout=60)

    def bulk(root):
        root["bulk"] = {n: bytes(chance.randrange(256) for _ in range(50)) * 200 for n in range(20)}

    for round_ in range(ROUNDS):
        cluster.primary()
        writers[round_ % 3].wait_for_more(2)
        what = round_ % 4
        packing = None
        if what == 1:
            packing = threading.Thread(target=pack, args=(packer,), daemon=True)
            packing.start()
        if what == 2:
            # One of them is behind by more than the log has, and is catching up when power fails. First all clients
            # must be there: one that has lost the others while it was connecting waits for this node only.
            for writer in writers:
                writer.wait_for_more(1)
            packer.commit(bulk)
            late = chance.choice(cluster.nodes)
            late.kill()
            for _ in range(10):
                packer.commit(bulk)
            late.start()
            time.sleep(chance.random())
        if what == 3:
            # Long enough for a checkpoint, sometimes.
            time.sleep(chance.random() * 3)
        time.sleep(chance.random() * 0.5)
        pull(cluster.nodes)
        for node in cluster.nodes:
            node.start()
        cluster.primary(timeout=60)
        writers[0].wait_for_more(1, timeout=60)
        if packing:
            packing.join(90)
            assert not packing.is_alive()
        if round_ % 5 == 4:
            cluster.stop()
            for node in cluster.nodes:
                transactions(node.data_file)
                node.start()
    packer.close()
    acknowledged = [one for writer in writers for one in writer.finish()]
    cluster.wait_level(timeout=90)
    cluster.stop()
    check_all(cluster, acknowledged)
    print("%d times, %d commits" % (ROUNDS, len(acknowledged)))


def check_all(cluster, acknowledged):
    """Every acknowledged commit is in every file, as Python reads it."""
    for node in cluster.nodes:
        db = ZODB.DB(ZODB.FileStorage.FileStorage(node.data_file, read_only=True))
        with db.transaction() as connection:
            trees = connection.root()["writers"]
            found = {name: set(tree.keys()) for name, tree in trees.items()}
        db.close()
        lost = [one for one in acknowledged if one[1] not in found[one[0]]]
        assert not lost, (node.name, lost)
