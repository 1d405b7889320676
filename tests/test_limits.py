"""What clients ask for beyond what can be: refused, and nothing else is harmed."""

import os
import subprocess
import time

import pytest
import ZODB.POSException
from persistent.mapping import PersistentMapping
from persistent.TimeStamp import TimeStamp
from ZEO.ClientStorage import ClientStorage
from ZODB.Connection import TransactionMetaData
from ZODB.utils import maxtid, p64, u64, z64

import cluster as harness
from large import Others, Refused, commit_many
from zeo_client import Client

UNFIT = os.path.join(os.path.dirname(harness.STANDBY), "examples", "unfit")


def store(storage, oid, serial, tid=None):
    """Commits a record, perhaps with a tid of its own; gives the tid."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction, tid)
    try:
        storage.store(oid, serial, b"cpersistent.mapping\nPersistentMapping\n.}U\x04data}s.", "", transaction)
        storage.tpc_vote(transaction)
        return storage.tpc_finish(transaction)
    except BaseException:
        storage.tpc_abort(transaction)
        raise


def at(seconds):
    return TimeStamp(*time.gmtime(seconds)[:5], seconds % 60).raw()


def test_tids_beyond_all_are_refused_before_they_are_in_the_log(nodes):
    cluster = nodes.cluster().start()
    storage = ClientStorage(cluster.addresses, wait_timeout=30)
    serial = store(storage, p64(1), z64)
    day = 86_400
    for tid in (p64(2**63), p64(2**64 - 1), p64(2**63 - 1), p64(2**63 - 2), at(time.time() + 2 * day)):
        with pytest.raises(Exception) as refused:
            store(storage, p64(1), serial, tid)
        assert "future-tids" in str(refused.value) and tid.hex() in str(refused.value)
    # An hour ahead is allowed, and what comes next follows it.
    ahead = at(time.time() + 3600)
    assert store(storage, p64(1), serial, ahead) == ahead
    assert store(storage, p64(1), ahead) == p64(u64(ahead) + 1)
    storage.close()
    # Nobody has stopped, and everybody starts again.
    for node in cluster.nodes:
        assert node.process.poll() is None
        node.stop()
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(after=1))
    client.close()


def test_more_of_the_future_is_allowed_by_the_configuration(nodes):
    cluster = nodes.cluster(options="  future-tids %d\n" % (20 * 365 * 86_400)).start()
    storage = ClientStorage(cluster.addresses, wait_timeout=30)
    ahead = at(time.time() + 10 * 365 * 86_400)
    assert store(storage, p64(1), z64, ahead) == ahead
    storage.close()


def test_no_oid_is_given_out_when_the_highest_is_in_use(nodes):
    node = nodes.alone().start()
    storage = ClientStorage(node.address, wait_timeout=30)
    first = storage.new_oid()
    store(storage, p64(2**64 - 50), z64)
    seen = set()
    with pytest.raises(Exception) as refused:
        # The client asks for a hundred at a time, and has some of the first hundred.
        for _ in range(200):
            seen.add(storage.new_oid())
    assert "no new oids are left" in str(refused.value)
    assert first not in seen and z64 not in seen and len(seen) < 100
    store(storage, p64(2**64 - 1), z64)
    assert storage.loadBefore(p64(2**64 - 1), maxtid)
    storage.close()
    # A restart changes nothing.
    node.stop()
    node.start()
    storage = ClientStorage(node.address, wait_timeout=30)
    with pytest.raises(Exception, match="no new oids are left"):
        storage.new_oid()
    storage.close()


def test_a_transaction_is_as_large_as_the_configuration_allows(nodes):
    options = "  transaction-objects 1000\n  transaction-size 1MB\n"
    cluster = nodes.cluster(options=options).start()
    client = Client(cluster.addresses)
    address = cluster.primary().address
    commit_many(address, range(1 << 32, (1 << 32) + 1000))
    with pytest.raises(Refused, match="at most 1000 objects.*transaction-objects in <standby>"):
        commit_many(address, range(1 << 40, (1 << 40) + 1001))
    with pytest.raises(ZODB.POSException.StorageError, match="transaction-size in <standby>"):
        client.commit(lambda root: root.update(x=b"x" * (1 << 20)), attempts=1)
    client.commit(lambda root: root.update(x=b"x" * 1000))
    client.close()
    cluster.wait_level()


def test_a_transaction_of_very_many_objects_holds_nobody_up(nodes):
    """Others commit meanwhile, none of them loses its connection, and all nodes have it in the end."""
    cluster = nodes.cluster().start()
    term = cluster.status()["term"]
    others = [Others(Client(cluster.addresses), str(number)) for number in range(2)]
    for other in others:
        other.start()
    began = time.monotonic()
    stores, vote, finish = commit_many(cluster.primary().address, range(1 << 32, (1 << 32) + 200_000))
    ended = time.monotonic()
    for other in others:
        other.stop()
    taken = sorted(taken for other in others for taken in other.latencies(began, ended))
    print(
        "200,000 objects: stores %.1f s, vote %.1f s, end %.1f s; beside it %d commits, median %.0f ms, longest %.0f ms"
        % (stores, vote, finish, len(taken), 1000 * taken[len(taken) // 2], 1000 * taken[-1])
    )
    assert cluster.status()["term"] == term
    for other in others:
        other.client.close()
    cluster.wait_level()


def test_an_undo_brings_back_much_in_one_record(nodes):
    """It takes a pointer in the data file, and all of the data on the way there."""
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    large = [os.urandom(700_000) for _ in range(5)]
    client.commit(lambda root: root.update({str(n): PersistentMapping(x=data) for n, data in enumerate(large)}))
    client.commit(lambda root: [root[str(n)].update(x=b"small") for n in range(5)])
    client.db.undo(client.db.undoLog(0, 1)[0]["id"], client.manager.get())
    client.manager.commit()
    client.sync()
    client.connection.cacheMinimize()
    assert [client.root[str(n)]["x"] for n in range(5)] == large
    client.commit(lambda root: root.update(after=1))
    client.close()
    cluster.wait_level()
    client = Client([cluster.nodes[-1].read_only_address], read_only=True)
    assert [client.root[str(n)]["x"] for n in range(5)] == large
    client.close()


@pytest.mark.parametrize("size", [1, 3])
def test_an_entry_that_no_node_can_apply_is_left_out_by_decision(nodes, size):
    """It ends all nodes, at each start. What was committed before it, and comes after it, is kept."""
    cluster = nodes.cluster(count=size).start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(before=1))
    client.close()
    cluster.wait_level()
    for node in cluster.nodes:
        node.kill()
    entries = set()
    for node in cluster.nodes:
        appended = subprocess.run([UNFIT, node.state_dir], capture_output=True, text=True, check=True, timeout=60)
        entries.add(tuple(appended.stdout.split()))
    ((index, term),) = entries
    for _ in range(2):
        for node in cluster.nodes:
            node.start()
        # Two of three are enough to commit it; whichever is the third waits for them.
        ended = lambda: [node for node in cluster.nodes if node.process.poll()]
        harness.wait_for("the end of the nodes", lambda: len(ended()) > size // 2, 60)
        told = [node for node in cluster.nodes if "--index %s --term %s" % (index, term) in node.log()]
        assert told
        for node in cluster.nodes:
            node.kill()

    def skip(node):
        command = [harness.STANDBY, "skip-entry", "-C", node.config_path, "--index", index, "--term", term]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    for node in cluster.nodes:
        done = skip(node)
        assert done.returncode == 0 and "on every other node" in done.stdout, done
    # Twice, the second time with a log in which it still is.
    for number in range(2):
        for node in cluster.nodes:
            node.start()
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(after=number))
        assert (client.root["before"], client.root["after"]) == (1, number)
        client.close()
        cluster.wait_level()
        assert any("was left out" in node.log() for node in cluster.nodes)
        refused = skip(cluster.nodes[0])
        assert refused.returncode == 1 and "stop the node first" in refused.stderr, refused
        for node in cluster.nodes:
            node.kill()
