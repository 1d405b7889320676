"""Power fails for all nodes at once, at random moments: only what was synced is there afterwards.

The nodes run in a program of their own (crates/standby/examples/unplugged.rs), which is the real node on a disk that
forgets. STANDBY_POWER_ROUNDS says how often; ./check does with a few.
"""

import collections
import os
import random
import shutil
import signal
import threading
import time

import pytest
import ZODB
import ZODB.FileStorage
from BTrees.LOBTree import LOBTree
from ZODB.blob import Blob
from ZODB.FileStorage.format import CorruptedError

import cluster as harness
from test_cluster import Writer
from zeo_client import RETRY, Client

UNPLUGGED = os.path.join(os.path.dirname(harness.STANDBY), "examples", "unplugged")
ROUNDS = int(os.environ.get("STANDBY_POWER_ROUNDS", "8"))
# A new cluster after so many: what is looked at each time must not grow for ever.
WITH_ONE_CLUSTER = 25
# One commit in so many has a blob.
BLOB_EVERY = 10


def unplugged(node):
    """Its command from now on."""
    node.command = lambda: [UNPLUGGED, "-C", node.config_path]
    return node


class Appender(Writer):
    """Each commit leaves something that a pack does not remove; some leave a blob."""

    def __init__(self, cluster, name):
        self.blob_dir = os.path.join(cluster.directory, "client-" + name)
        super().__init__(cluster.addresses, name, blob_dir=self.blob_dir)

    def run(self):
        try:
            while not self.stopping.is_set():
                number = len(self.acknowledged)

                def add(root):
                    if self.name not in root["writers"]:
                        root["writers"][self.name] = LOBTree()
                    root["writers"][self.name][number] = value_of(self.name, number)

                self.client.commit(add, attempts=10000)
                self.acknowledged.append((self.name, number))
        except Exception as error:  # pragma: no cover
            self.error = error


def text_of(name, number):
    return b"%s %d " % (name.encode(), number) * 500


def value_of(name, number):
    if number % BLOB_EVERY:
        return name
    blob = Blob()
    with blob.open("w") as file:
        file.write(text_of(name, number))
    return blob


def pull(nodes):
    for node in nodes:
        node.signal(signal.SIGUSR1)
    for node in nodes:
        status = node.wait()
        assert status == 99, (status, node.log()[-3000:])


def pack(client, counts):
    try:
        client.db.pack()
        counts["packs ended"] += 1
    except RETRY:
        counts["packs cut short"] += 1


def look(node, known):
    """What of `known` is not in the node's file yet, as Python reads it; the node may be running."""
    file = os.stat(node.data_file).st_ino
    try:
        return look_at(node, known)
    except CorruptedError:
        # Python opens the file by its name again and again: of one that a pack has replaced meanwhile it sees nonsense.
        if os.stat(node.data_file).st_ino == file:
            raise
        return known


def look_at(node, known):
    storage = ZODB.FileStorage.FileStorage(
        node.data_file, read_only=True, blob_dir=node.blob_dir
    )
    db = ZODB.DB(storage)
    try:
        with db.transaction() as connection:
            trees = connection.root()["writers"]
            return [one for one in known if not is_there(trees.get(one[0], {}), *one)]
    finally:
        db.close()


def is_there(tree, name, number):
    found = tree.get(number)
    if number % BLOB_EVERY or found is None:
        return found == name
    with found.open("r") as file:
        assert file.read() == text_of(name, number)
    return True


def wait_everywhere(cluster, known):
    """Every node's file opens in Python, and has all that was acknowledged."""
    for node in cluster.nodes:
        lost = []

        def caught_up():
            lost[:] = look(node, known)
            return not lost

        try:
            # Until it listens, the node cuts off what does not count.
            harness.wait_for("%s to listen" % node.name, node.status)
            harness.wait_for("all on %s" % node.name, caught_up, timeout=60)
        except AssertionError as error:
            raise AssertionError((node.name, len(known), lost[:20])) from error


@pytest.mark.parametrize("recovery", ["normal", "fast"])
def test_row_42_all_nodes_lose_power_at_random_moments(nodes, recovery):
    seed = int(os.environ.get("STANDBY_SEED", time.time()))
    print("STANDBY_SEED=%d" % seed)
    chance = random.Random(seed)
    counts = collections.Counter()
    for first in range(0, ROUNDS, WITH_ONE_CLUSTER):
        rounds = range(first, min(first + WITH_ONE_CLUSTER, ROUNDS))
        cluster = nodes.cluster(
            "cluster-%d" % first, options="  log-tail 1MB\n  recovery %s\n" % recovery, blobs=True
        )
        pull_again_and_again(cluster, rounds, chance, counts)
        shutil.rmtree(cluster.directory)
        print(", ".join("%s %d" % pair for pair in sorted(counts.items())), flush=True)


def pull_again_and_again(cluster, rounds, chance, counts):
    for node in cluster.nodes:
        unplugged(node)
    cluster.start()
    writers = [Appender(cluster, "w%d" % n) for n in range(3)]
    packer = Client(cluster.addresses, wait_timeout=60)

    def bulk(root):
        root["bulk"] = {n: bytes(chance.randrange(256) for _ in range(50)) * 200 for n in range(20)}

    for round_ in rounds:
        cluster.primary()
        writers[round_ % 3].wait_for_more(2)
        what = ("commits", "packs", "catch-ups", "checkpoints")[round_ % 4]
        counts[what] += 1
        packing = None
        if what == "packs":
            packing = threading.Thread(target=pack, args=(packer, counts), daemon=True)
            packing.start()
            time.sleep(chance.random() * 0.1)
        if what == "catch-ups":
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
        if what == "checkpoints":
            # One every ten seconds, if there is something to say.
            time.sleep(chance.random() * 3)
        if what != "packs":
            time.sleep(chance.random() * 0.5)
        pull(cluster.nodes)
        known = [one for writer in writers for one in writer.acknowledged]
        for node in cluster.nodes:
            node.start()
        cluster.primary(timeout=60)
        writers[0].wait_for_more(1, timeout=60)
        wait_everywhere(cluster, known)
        if packing:
            packing.join(90)
            assert not packing.is_alive()
    packer.close()
    acknowledged = [one for writer in writers for one in writer.finish()]
    cluster.wait_level(timeout=90)
    cluster.stop()
    # Stopped, they have been cut to what counts; and no more may be there than was tried.
    for node in cluster.nodes:
        assert not look(node, acknowledged), node.name
    counts["commits acknowledged"] += len(acknowledged)
