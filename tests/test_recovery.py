"""Fast recovery: a node that was away gets what is current, and the history between when it is asked for."""

import base64
import filecmp
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import transaction
import ZODB
import ZODB.FileStorage
from persistent.mapping import PersistentMapping
from persistent.TimeStamp import TimeStamp
from ZODB.blob import Blob
from ZEO.Exceptions import ServerException
from ZODB.POSException import POSKeyError, ReadConflictError, StorageError
from ZODB.utils import p64, u64

import cluster as harness
from zeo_client import Client, open_storage, transactions

KEYS = 40


def fill(client, seed, count):
    """Random transactions over a few objects: changes, deletions, references, undos."""
    rng = random.Random(seed)

    def change(root):
        tree = root.setdefault("tree", PersistentMapping())
        for _ in range(rng.randrange(1, 4)):
            key = "k%d" % rng.randrange(KEYS)
            if rng.random() < 0.1 and key in tree:
                del tree[key]
            elif key in tree and rng.random() < 0.7:
                tree[key]["number"] = rng.random()
                tree[key]["text"] = "x" * rng.randrange(2000)
            else:
                tree[key] = PersistentMapping(number=rng.random(), other=rng.choice([*tree.values(), None]))

    for number in range(count):
        client.commit(change, note="%s %d" % (seed, number))
        if rng.random() < 0.1:
            client.db.undo(client.db.undoLog(0, 1)[0]["id"], client.manager.get())
            client.manager.commit()
            client.sync()


def contents(root):
    """What can be reached from the root: a dangling reference is an error here."""
    seen, todo, found = set(), list(root.get("tree", {}).items()), {}
    while todo:
        name, mapping = todo.pop()
        if mapping is None or mapping._p_oid in seen:
            continue
        seen.add(mapping._p_oid)
        items = dict(mapping)
        todo.append((name, items.pop("other", None)))
        found[mapping._p_oid] = items
    return found


def contents_of_file(path):
    storage = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    db = ZODB.DB(storage)
    try:
        with db.transaction() as connection:
            return contents(connection.root())
    finally:
        db.close()


def holes(cluster, node):
    return cluster.seen(node).get("holes", {}).get("1", [])


def wait_for_holes(cluster, node, count):
    """The nodes tell each other twice a second."""
    harness.wait_for("%d holes" % count, lambda: len(holes(cluster, node)) == count, timeout=60)
    return holes(cluster, node)


def away(cluster, node):
    """Takes a node away so that it must catch up when it comes back: it forgets all but its data file."""
    cluster.wait_level()
    node.stop()
    shutil.rmtree(node.state_dir)


def raw(text):
    return bytes.fromhex(text)


def check_equal(cluster):
    cluster.stop()
    first, *others = cluster.nodes
    for other in others:
        assert transactions(other.data_file) == transactions(first.data_file)
        assert filecmp.cmp(other.data_file, first.data_file, shallow=False)


@pytest.fixture
def holed(nodes, tmp_path):
    """A cluster whose third node has a hole in its history: (cluster, node, client, hole)."""
    cluster = nodes.cluster(options="  recovery fast\n", blobs=True).start()
    node = cluster.nodes[2]
    cluster.make_primary(cluster.nodes[0])
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "cache"))
    fill(client, "before", 30)
    away(cluster, node)
    fill(client, "hole", 150)
    node.start()
    cluster.wait_level()
    fill(client, "after", 20)
    cluster.wait_level()
    (hole,) = wait_for_holes(cluster, node, 1)
    yield cluster, node, client, hole
    client.close()


def test_row_30_a_fast_recovery_gets_what_is_current(holed):
    cluster, node, client, hole = holed
    client.sync()
    expected = contents(client.root)
    reader = Client(node.read_only_address, read_only=True)
    assert contents(reader.root) == expected
    reader.close()
    assert "no history from" in cluster.nodes[0].ask("status")
    first = cluster.nodes[0]
    # Much of what was replaced in the hole never came.
    assert os.path.getsize(node.data_file) < 0.7 * os.path.getsize(first.data_file)
    client.close()
    cluster.stop()
    assert contents_of_file(node.data_file) == expected
    # Outside of the hole, the history is the same.
    outside = lambda path: [  # noqa: E731
        t for t in transactions(path) if not raw(hole["after"]) < t[0] <= raw(hole["through"])
    ]
    assert outside(node.data_file) == outside(first.data_file)


def test_row_35_what_lies_in_a_hole_is_refused(holed):
    cluster, node, client, hole = holed
    after, through = raw(hole["after"]), raw(hole["through"])
    known = transactions(cluster.nodes[0].data_file)
    inside = [t for t in known if after < t[0] <= through]
    storage = open_storage(node.read_only_address, read_only=True)
    whole = open_storage(cluster.nodes[0].read_only_address, read_only=True)
    changed = max({r[0] for t in inside for r in t[4]}, key=lambda oid: len(whole.history(oid, 1000)))
    with pytest.raises(POSKeyError, match="a fast recovery left it out"):
        storage.history(changed, 1000)
    assert storage.history(changed, 1)[0]["tid"] == whole.history(changed, 1)[0]["tid"]
    with pytest.raises(StorageError, match="standby node backfill"):
        next(iter(storage.iterator()))
    assert [t.tid for t in storage.iterator(p64(u64(through) + 1))] == [
        t[0] for t in known if t[0] > through
    ]
    assert [t.tid for t in storage.iterator(None, after)] == [t[0] for t in known if t[0] <= after]
    # A moment before the hole, one after it, and one within.
    assert storage.loadBefore(changed, p64(u64(after) + 1))[:2] == whole.loadBefore(
        changed, p64(u64(after) + 1)
    )[:2]
    assert storage.loadBefore(changed, p64(u64(through) + 1)) == whole.loadBefore(
        changed, p64(u64(through) + 1)
    )
    middle = inside[len(inside) // 2][0]
    db = ZODB.DB(storage)
    with pytest.raises((POSKeyError, ReadConflictError)):
        db.open(transaction.TransactionManager(), before=middle).get(changed).keys()
    serials = [r[1] for t in inside for r in t[4] if r[0] == changed]
    with pytest.raises(POSKeyError, match="a fast recovery left it out"):
        storage.loadSerial(changed, serials[0])
    # A client that was within the hole drops its cache.
    assert storage._call("getInvalidations", middle) is None
    whole.close()
    db.close()
    # As primary it undoes what is not in the hole.
    node.ask("switchover", "--to", node.name)
    client.sync()
    log = client.db.undoLog(0, 1000)
    last = [t for t in known if t[0] > through]
    assert len(log) == len(last)
    # Stock clients make of every UndoError a ServerException.
    with pytest.raises(ServerException, match="UndoError.*a fast recovery left it out"):
        client.db.undo(base64.encodebytes(inside[-1][0]).rstrip(), client.manager.get())
        client.manager.commit()
    client.manager.abort()
    client.db.undo(log[0]["id"], client.manager.get())
    client.manager.commit()
    fill(client, "primary", 20)
    cluster.wait_level()


def test_a_backfill_makes_the_files_equal(holed):
    cluster, node, client, _ = holed
    client.commit(lambda root: root.update(blob=Blob(b"first")))
    client.commit(lambda root: root["blob"].open("w").write(b"second"))
    away(cluster, node)
    # Revisions of a blob that a fast recovery leaves out too; and a second hole.
    for number in range(5):

        def change(root):
            with root["blob"].open("w") as file:
                file.write(b"in the hole %d" % number)

        client.commit(change)
    last = client.db.undoLog(0, 1)[0]["id"]
    fill(client, "second hole", 20)
    # With the data file alone, all that was missing in it is missing still.
    cluster_files = lambda n: sorted(f for _, _, fs in os.walk(n.blob_dir) for f in fs)  # noqa: E731
    os.remove(node.data_file)
    node.start()
    cluster.wait_level()
    wait_for_holes(cluster, node, 1)
    assert len(cluster_files(node)) < len(cluster_files(cluster.nodes[0]))
    reader = Client(node.read_only_address, read_only=True, blob_dir=node.directory + "/cache")
    assert reader.root["blob"].open("r").read() == b"in the hole 4"
    # What an undo brings back lies in the hole, with its blob.
    client.db.undo(last, client.manager.get())
    client.manager.commit()
    cluster.wait_level()
    reader.sync()
    assert reader.root["blob"].open("r").read() == b"in the hole 3"
    printed = cluster.nodes[0].ask("node", "backfill", node.name)
    assert "done: n3 has the whole history" in printed, printed
    assert cluster.nodes[1].ask("node", "backfill", node.name) == "n3 has the whole history\n"
    wait_for_holes(cluster, node, 0)
    # Readers have not noticed, and commits go on.
    fill(client, "later", 5)
    reader.sync()
    client.sync()
    assert contents(reader.root) == contents(client.root)
    storage = reader.db.storage
    oid = client.root["tree"]._p_oid
    assert len(storage.history(oid, 1000)) == len(client.db.storage.history(oid, 1000))
    reader.close()
    cluster.wait_level()
    assert cluster_files(node) == cluster_files(cluster.nodes[0])
    check_equal(cluster)


def test_packs_are_sound_with_a_hole(holed):
    cluster, node, client, hole = holed
    client.sync()
    expected = contents(client.root)
    begin, end = (TimeStamp(raw(hole[key])).timeTime() for key in ("after", "through"))
    # Of a moment within the hole nothing is known: what was needless before it goes.
    for moment in ((begin + end) / 2, time.time()):
        client.db.storage.pack(moment, None)
        cluster.wait_level()
        harness.wait_for(
            "the end of all packs",
            lambda: not any(n.get("packing") for n in cluster.status()["nodes"]),
        )
        reader = Client(node.read_only_address, read_only=True)
        assert contents(reader.root) == expected
        reader.close()
    # What the second pack has left is the same everywhere.
    wait_for_holes(cluster, node, 0)
    check_equal(cluster)


def test_a_recovery_that_is_cut_short_goes_on(nodes):
    cluster = nodes.cluster(options="  recovery fast\n  catch-up-rate 4MB\n").start()
    node = cluster.nodes[2]
    cluster.make_primary(cluster.nodes[0])
    client = Client(cluster.addresses)
    text = os.urandom(1_000_000).hex()

    def big(number):
        client.commit(
            lambda root: root.update({"big %d" % (number % 7): PersistentMapping(number=number, text=text)})
        )

    for number in range(5):
        big(number)
    away(cluster, node)
    for number in range(12):
        big(number)
    fill(client, "missed", 20)
    for round_ in range(2):
        node.start()
        harness.wait_for("a catch-up", lambda: "fast recovery" in node.log().split("resuming")[-1])
        time.sleep(1)
        assert "caught up" not in node.log().split("fast recovery")[-1]
        node.kill()
        big(20 + round_)
        fill(client, "meanwhile %d" % round_, 5)
    node.start()
    cluster.wait_level()
    client.sync()
    reader = Client(node.read_only_address, read_only=True)
    assert contents(reader.root) == contents(client.root)
    assert {k: v["number"] for k, v in reader.root.items() if k.startswith("big")} == {
        k: v["number"] for k, v in client.root.items() if k.startswith("big")
    }
    reader.close()
    wait_for_holes(cluster, node, 1)
    # The filling goes on after a crash, unasked.
    assert "n9 is no node" in node.ask("node", "backfill", "n9", fails=True)
    assert "gets the history" in backfill_begun(node)
    harness.wait_for("some history", lambda: "filling the hole" in node.log())
    time.sleep(1)
    node.kill()
    big(30)
    node.start()
    wait_for_holes(cluster, node, 0)
    client.close()
    cluster.wait_level()
    check_equal(cluster)


def backfill_begun(node):
    """Asks for a backfill without waiting for its end."""
    command = [harness.STANDBY, "node", "backfill", node.name]
    command += ["--at", "127.0.0.1:%d" % node.admin_port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        line = asking.stdout.readline()
        asking.terminate()
        return line


def test_readers_meanwhile_see_only_what_was(nodes):
    """A replica that is frozen for long, with a client that goes on when it does."""
    cluster = nodes.cluster(options="  recovery fast\n  log-tail 1KB\n").start()
    node = cluster.nodes[2]
    cluster.make_primary(cluster.nodes[0])
    client = Client(cluster.addresses)

    def setup(root):
        for key in "abcd":
            root[key] = PersistentMapping(number=0)

    client.commit(setup)
    cluster.wait_level()
    reader = Client(node.read_only_address, read_only=True, server_sync=False)
    assert reader.root["a"]["number"] == 0
    node.signal(signal.SIGSTOP)

    def step(root):
        # Each transaction changes two of the four; their sums are equal before and after.
        first, second = rng.sample("abcd", 2)
        root[first]["number"] += 1
        root[second]["number"] -= 1

    rng = random.Random(1)
    deadline = time.monotonic() + 23
    while time.monotonic() < deadline:
        client.commit(step)
        time.sleep(0.05)
    node.signal(signal.SIGCONT)
    values = lambda root: [root[key]["number"] for key in "abcd"]  # noqa: E731
    deadline = time.monotonic() + 30
    while True:
        client.sync()
        try:
            reader.sync()
            found = values(reader.root)
        except (ReadConflictError, StorageError):
            reader.manager.abort()
            found = None
        if found is not None:
            assert sum(found) == 0, found
            if found == values(client.root):
                break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "fast recovery" in node.log()
    wait_for_holes(cluster, node, 1)
    reader.close()
    client.close()
