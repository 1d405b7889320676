"""No commit is ambiguous: a client that loses its connection while it commits asks what became of it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import StorageError
from ZODB.utils import z64

from middleman import Middleman, kill_when
from test_membership import stopping  # noqa: F401 (a fixture)
from test_promotion import take_down, wait_no_primary
from test_standby_zodb import Follower, standby_zodb
from zeo_client import open_storage


@pytest.fixture
def middlemen():
    made = []

    def between(node):
        made.append(Middleman(node.address))
        return made[-1]

    yield between
    for middleman in made:
        middleman.close()


def count(root):
    root["n"] = root.get("n", 0) + 1


def named(storage, token):
    """Writes the root object in a transaction with this token; returns the tid and what was known before."""
    since = storage.lastTransaction() or z64
    txn = transaction.TransactionManager().begin()
    storage.tpc_begin(txn)
    storage._async("transaction_token", id(txn), token)
    data, serial = storage.load(z64)
    storage.store(z64, serial, data, "", txn)
    try:
        storage.tpc_vote(txn)
    except StorageError:
        storage.tpc_abort(txn)
        raise
    return storage.tpc_finish(txn), since


def with_root(addresses):
    """A stock storage of a database that is there."""
    Follower(addresses).close()
    return open_storage(addresses)


def outcome(storage, token, since):
    for _ in range(200):
        try:
            return storage._call("transaction_outcome", token, since)
        except ClientDisconnected:
            time.sleep(0.05)
    raise AssertionError("there is no primary")


@pytest.mark.parametrize("how, failures", [("before", 1), ("after", 0), ("late", 1)])
def test_a_connection_that_breaks_during_the_commit(nodes, encoding, middlemen, how, failures):
    cluster = nodes.cluster(zeo=encoding).start()
    observer = Follower(cluster.addresses)
    observer.commit(lambda root: root.update(n=0))
    for number in (1, 2, 3):
        middleman = middlemen(cluster.primary())
        client = Follower([middleman.address])
        middleman.breaks = how
        tid, failed = client.commit(count)
        # A busy machine may have changed the primary once more. A false error would count twice.
        assert middleman.broken.is_set() and failed >= failures
        middleman.release()
        # Whatever was on its way has come.
        time.sleep(0.3)
        observer.manager.begin()
        assert observer.root["n"] == number
        assert client.root["n"] == number and client.storage.lastTransaction() >= tid
        # It goes on, and so do those who have seen the commit as an invalidation.
        client.commit(lambda root: root.update(seen=number))
        observer.commit(lambda root: root.update(observed=number))
        client.close()
    observer.close()


def test_the_primary_dies_before_it_answers(nodes, middlemen):
    cluster = nodes.cluster().start()
    for number in (1, 2):
        primary = cluster.primary()
        middleman = middlemen(primary)
        client = Follower([middleman.address])
        middleman.breaks = "after"
        killing = kill_when(primary, middleman.broken)
        # It is committed already or not: the client knows which, and tries again if not.
        client.commit(count)
        killing.join(30)
        client.manager.begin()
        assert client.root["n"] == number
        client.close()
        primary.start()
        cluster.wait_healthy()


def test_what_is_known_survives(stopping):  # noqa: F811
    cluster = stopping().start()
    storage = with_root(cluster.addresses)
    first, other = os.urandom(16), os.urandom(16)
    tid, since = named(storage, first + b"\0" * 7 + b"\1")
    assert outcome(storage, first + b"\0" * 7 + b"\1", since) == tid
    never = first + b"\0" * 7 + b"\2"
    assert outcome(storage, never, since) is None
    # A client's next transaction takes the place of the one before.
    later, _ = named(storage, other + b"\0" * 7 + b"\1")
    again, before = named(storage, other + b"\0" * 7 + b"\2")
    assert outcome(storage, other + b"\0" * 7 + b"\2", before) == again
    assert "does not know any more" in outcome(storage, other + b"\0" * 7 + b"\1", since)

    def is_known():
        assert outcome(storage, first + b"\0" * 7 + b"\1", since) == tid
        assert outcome(storage, never, since) is None

    # Another primary.
    killed = cluster.primary()
    killed.kill()
    is_known()
    killed.start()
    cluster.wait_healthy()
    # A pack, and a restart of all from their checkpoints.
    storage.pack(time.time(), wait=True)
    is_known()
    cluster.stop()
    cluster.start()
    is_known()
    # A node that has its data from another one, not from the log.
    printed = cluster.nodes[0].ask("node", "add", "n4")
    node = cluster.invited(os.path.join(cluster.directory, "n4"), "n4", printed)
    node.start()
    cluster.wait_healthy()
    cluster.make_primary(node)
    is_known()
    for name in ("committed", "not_committed"):
        assert sum(node.metric("standby_outcomes_%s_total" % name) for node in cluster.nodes) >= 2
    storage.close()


def test_a_forced_promotion_leaves_doubt(nodes, middlemen):
    cluster = nodes.cluster(groups=["here", "far"]).start()
    here, far = cluster.nodes
    storage = with_root(cluster.addresses)
    kept = os.urandom(24)
    tid, since = named(storage, kept)
    cluster.wait_level()
    storage.close()
    middleman = middlemen(here)
    client = Follower([middleman.address], wait_timeout=10)
    client.manager.begin()
    client.root["x"] = 1
    # The transaction is lost, and so is the node that could say so.
    middleman.breaks = "before"
    take_down([far])
    killing = kill_when(here, middleman.broken)
    with ThreadPoolExecutor(1) as committing:
        committed = committing.submit(client.manager.commit)
        killing.join(30)
        far.start()
        wait_no_primary(far, lost=[here])
        far.ask("promote", "--group", "far", "--force", "--yes")
        with pytest.raises(standby_zodb.OutcomeUnknownError, match="timeline has changed"):
            committed.result(60)
    # What is there is known all the same.
    storage = open_storage([far.address])
    assert outcome(storage, kept, since) == tid
    storage.close()
    client.close()


@pytest.mark.parametrize("wrong", [b"", b"short", b"x" * 25])
def test_a_token_of_the_wrong_size(nodes, wrong):
    alone = nodes.alone().start()
    storage = with_root([alone.address])
    with pytest.raises(StorageError, match="a transaction token has 24 bytes, this one has %d" % len(wrong)):
        named(storage, wrong)
    with pytest.raises(StorageError, match="24 bytes"):
        outcome(storage, wrong, z64)
    # The connection goes on.
    named(storage, os.urandom(24))
    storage.close()
