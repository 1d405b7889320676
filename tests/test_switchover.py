"""Planned changes of the primary, with stock clients."""

import contextlib
import os
import pickle
import signal
import threading
import time

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import Blob
from ZODB.utils import z64

import cluster as harness
from test_alone import call, connect, receive, send
from test_blobs import staged
from test_cluster import Writer, check_histories
from zeo_client import Client, Voted, is_passing, open_storage


def count_disconnections(storage):
    """How often a storage has lost its server, from now on."""
    lost = []
    original = storage.notify_disconnected
    storage.notify_disconnected = lambda *args: (lost.append(time.monotonic()), original(*args))
    return lost


def asked(node, *words):
    """Runs an administrator's command beside the test; join() gives what it prints."""
    printed = []
    thread = threading.Thread(target=lambda: printed.append(node.ask(*words)), daemon=True)
    thread.start()

    def join():
        thread.join(60)
        assert printed, "the command has failed or does not end"
        return printed[0]

    return join


def test_switchovers_under_load(nodes, encoding):
    cluster = nodes.cluster(zeo=encoding).start()
    writers = [Writer(cluster.addresses, "w%d" % n) for n in range(3)]
    for _ in range(12):
        for writer in writers:
            writer.wait_for_more()
        before = cluster.primary()
        # Any node takes the command.
        cluster.nodes[0].ask("switchover")
        assert cluster.primary().name != before.name
    acknowledged = [note for writer in writers for note in writer.finish()]
    check_histories(cluster, acknowledged)


def test_no_reply_is_lost(nodes):
    """A client is told of every commit of its own: it loses its connection before or after tpc_finish,
    never in it."""
    cluster = nodes.cluster().start()
    storage = open_storage(cluster.addresses)
    oid = storage.new_oid()
    serial, done, stop = z64, [], threading.Event()
    switching = threading.Thread(
        target=lambda: [cluster.nodes[0].ask("switchover") or time.sleep(0.1) for _ in range(15)],
        daemon=True,
    )
    switching.start()
    while switching.is_alive() or len(done) < 100:
        txn = transaction.TransactionManager().begin()
        data = b"\x80\x02cpersistent\nPersistent\nq\x01.K\x01."
        try:
            storage.tpc_begin(txn)
            storage.store(oid, serial, data, "", txn)
            storage.tpc_vote(txn)
        except (ClientDisconnected, AttributeError) as error:
            # A client of ZEO 5 that loses its connection just then says so in its own way.
            assert is_passing(error)
            with contextlib.suppress(ClientDisconnected, AttributeError):
                storage.tpc_abort(txn)
            continue
        serial = storage.tpc_finish(txn)
        done.append(serial)
    switching.join()
    assert done == sorted(set(done))
    storage.close()


def test_the_chosen_node_becomes_primary_and_mistakes_are_explained(nodes):
    cluster = nodes.cluster().start()
    n1 = cluster.named("n1")
    assert "n3 is primary" in n1.ask("switchover", "--to", "n3")
    assert cluster.primary().name == "n3"
    assert "n3 is primary already" in n1.ask("switchover", "--to", "n3", fails=True)
    wrong = n1.ask("switchover", "--to", "n9", fails=True)
    assert "n9 is no node of this cluster; its nodes: n1, n2, n3" in wrong
    cluster.named("n2").kill()
    harness.wait_for(
        "n2 to be down", lambda: {n["node"]: n["state"] for n in n1.status()["nodes"]}["n2"] == "down"
    )
    assert "n2 is down" in n1.ask("switchover", "--to", "n2", fails=True)
    n1.kill()
    n3 = cluster.named("n3")
    harness.wait_for("n3 to step down", lambda: n3.status()["primary"] is None)
    assert "there is no primary" in n3.ask("switchover", fails=True)


def test_row_22_a_switchover_to_a_frozen_node_goes_back(nodes):
    cluster = nodes.cluster().start()
    primary = cluster.primary()
    target = next(node for node in cluster.nodes if node is not primary)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=0))
    target.signal(signal.SIGSTOP)
    started = time.monotonic()
    try:
        answer = primary.ask("switchover", "--to", target.name, fails=True)
        assert time.monotonic() - started < 2.5
        assert "the switchover to %s was given up" % target.name in answer
        client.commit(lambda root: root.update(number=1))
        assert cluster.primary() is primary
    finally:
        target.signal(signal.SIGCONT)
    cluster.wait_healthy()
    assert cluster.primary() is primary, "a late node does not take what was taken back"


def test_row_22_a_target_that_dies_in_the_hand_over(nodes):
    """Whatever the moment is, there is one primary within seconds and nothing is lost."""
    cluster = nodes.cluster().start()
    writer = Writer(cluster.addresses, "w")
    for delay in (0, 0.002, 0.004, 0.006, 0.01):
        writer.wait_for_more()
        primary = cluster.primary()
        target = next(node for node in cluster.nodes if node is not primary)
        command = [harness.STANDBY, "switchover", "--to", target.name]
        process = harness.subprocess.Popen(
            command + ["--at", "127.0.0.1:%s" % primary.admin_port],
            stdout=harness.subprocess.DEVNULL,
            stderr=harness.subprocess.DEVNULL,
        )
        time.sleep(delay)
        target.kill()
        killed = time.monotonic()
        writer.wait_for_more(1)
        assert time.monotonic() - killed < 5
        process.wait(30)
        target.start()
        cluster.wait_healthy()
    check_histories(cluster, writer.finish())


def test_row_23_a_transaction_that_has_voted_finishes(nodes):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    voted = Voted(cluster.addresses)
    switchover = asked(cluster.primary(), "switchover", "--grace", "20")
    # Commits of others are held meanwhile, not refused.
    held = []
    committing = threading.Thread(
        target=lambda: held.append(client.commit(lambda root: root.update(number=1))), daemon=True
    )
    time.sleep(0.3)
    committing.start()
    time.sleep(0.7)
    assert not held
    tid = voted.finish()
    assert "is primary" in switchover()
    committing.join(20)
    assert held, "the commit that was held goes on with the new primary"
    other = open_storage(cluster.addresses)
    assert other.load(voted.oid)[1] == tid
    other.close()


def test_row_23_a_transaction_that_hangs_is_aborted_after_the_grace(nodes):
    cluster = nodes.cluster().start()
    before = cluster.primary()
    voted = Voted(cluster.addresses)
    started = time.monotonic()
    assert "is primary" in before.ask("switchover", "--grace", "1")
    assert 1 <= time.monotonic() - started < 4
    with pytest.raises(ClientDisconnected):
        voted.finish()
    assert cluster.primary() is not before


def test_row_23_an_upload_is_waited_for(nodes, tmp_path):
    cluster = nodes.cluster(blobs=True).start()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "cache"))

    def store(root):
        root["blob"] = Blob()
        with root["blob"].open("w") as file:
            for _ in range(200):
                file.write(b"x" * (1 << 20))

    failures = []
    committing = threading.Thread(
        target=lambda: failures.append(client.commit(store)[1]), daemon=True
    )
    committing.start()
    harness.wait_for(
        "an upload", lambda: any(staged(node.blob_dir) for node in cluster.nodes), poll=0.001
    )
    assert "is primary" in cluster.nodes[0].ask("switchover", "--grace", "30")
    committing.join(60)
    assert failures == [0], "the upload was cut off"


def test_a_pack_that_its_client_waits_for_is_waited_for(nodes):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    # It takes a moment to copy.
    client.commit(lambda root: root.update(large=PersistentMapping(data=os.urandom(100 << 20))))
    for number in range(3):
        client.commit(lambda root: root.update(number=number))
        primary = cluster.primary()
        packs = primary.log().count(" packing ")
        failures = []

        def pack():
            try:
                client.db.storage.pack(time.time() + 1)
            except Exception as error:  # pylint: disable=broad-except
                failures.append(error)

        packing = threading.Thread(target=pack, daemon=True)
        packing.start()
        harness.wait_for(
            "a pack",
            lambda: failures or primary.log().count(" packing ") > packs,
            poll=0.001,
        )
        assert "is primary" in primary.ask("switchover", "--grace", "30")
        packing.join(60)
        assert not failures
        assert cluster.primary() is not primary
        cluster.wait_healthy()
        # The next primary may still pack, and would refuse another pack.
        harness.wait_for(
            "the end of all packs",
            lambda: not any(node.get("packing") for node in cluster.status()["nodes"]),
        )


def test_readers_keep_their_sessions_through_every_change_of_role(nodes):
    """Promotion and demotion of their own node, a switchover elsewhere, and the primary's death."""
    cluster = nodes.cluster().start()
    n1, n2, n3 = cluster.nodes
    n1.ask("switchover", "--to", "n1", fails=cluster.primary() is n1)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=0))
    reader = Client([n2.read_only_address], read_only=True)
    lost = count_disconnections(reader.db.storage)

    def check(number):
        client.commit(lambda root: root.update(number=number))
        # It began with server_sync: what was acknowledged before is seen.
        reader.connection.sync()
        assert reader.root["number"] == number

    check(1)
    n1.ask("switchover", "--to", "n2")
    check(2)
    n1.ask("switchover", "--to", "n3")
    check(3)
    n1.ask("switchover", "--to", "n1")
    check(4)
    n1.kill()
    check(5)
    assert not lost
    reader.close()


def test_server_sync_on_a_replica_sees_all_that_is_acknowledged(nodes, encoding):
    """Read index: also on a replica that is paused now and then, a transaction begins with what
    another client has been told is committed."""
    cluster = nodes.cluster(zeo=encoding).start()
    replica = next(node for node in cluster.nodes if node is not cluster.primary())
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(object=PersistentMapping(number=0)))
    reader = Client([replica.read_only_address], read_only=True)
    for number in range(1, 300):
        client.commit(lambda root: root["object"].update(number=number))
        if number % 50 == 0:
            replica.signal(signal.SIGSTOP)
            threading.Timer(0.2, replica.signal, [signal.SIGCONT]).start()
        reader.connection.sync()
        assert reader.root["object"]["number"] == number
    reader.close()


def test_row_39_a_flapping_node_stays_back(nodes):
    """It is frozen, for longer than the others wait, whenever it is primary."""
    cluster = nodes.cluster().start()
    flapping = cluster.primary()
    for times in range(1, 4):
        cluster.make_primary(flapping)
        # The others know it as primary before it serves, and only that can be lost.
        harness.wait_for(
            "it to serve", lambda: flapping.log().count("this node is primary") >= times
        )
        flapping.signal(signal.SIGSTOP)
        harness.wait_for(
            "another primary",
            lambda: any(
                (node.status() or {}).get("primary") == node.name
                for node in cluster.nodes
                if node is not flapping
            ),
        )
        flapping.signal(signal.SIGCONT)
        # It takes a moment until the others hear it again.
        time.sleep(1.5)
        cluster.wait_healthy()
    assert cluster.seen(flapping)["flapping"]
    assert "flapping" in cluster.primary().ask("status")
    # The primary dies; of the two that are left, the other one takes over, whatever its rank.
    dead = cluster.primary()
    (other,) = [node for node in cluster.nodes if node not in (dead, flapping)]
    dead.kill()
    assert cluster.primary() is other
    # One that flaps is better than none.
    dead.start()
    cluster.wait_healthy()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1))
    client.close()


def test_row_41_a_node_that_crashes_again_and_again_does_not_lead(nodes):
    cluster = nodes.cluster().start()
    victim = cluster.primary()
    victim.stop()
    with open(os.path.join(victim.state_dir, "crashes"), "w") as crashes:
        crashes.write(("%d\n" % time.time()) * 3)
    victim.start()
    cluster.wait_healthy()
    # Its reports come twice a second.
    harness.wait_for("the others to know", lambda: cluster.seen(victim)["crashes"])
    for _ in range(2):
        primary = cluster.primary()
        assert primary is not victim
        changed = victim.log().count("candidacy=Stands")
        primary.kill()
        leads = cluster.primary()
        # Where the others take more than five seconds, on a busy machine, it is better than none.
        assert leads is not victim or victim.log().count("candidacy=Stands") > changed
        primary.start()
        cluster.wait_healthy()
        if leads is victim:
            victim.ask("switchover")
    assert "does not stand for election" in victim.log()


def test_row_41_a_node_that_crashes_leads_if_nobody_else_can(nodes):
    """It has acknowledged what the other node that is left has not."""
    cluster = nodes.cluster().start()
    primary = cluster.primary()
    victim, behind = (node for node in cluster.nodes if node is not primary)
    behind.stop()
    victim.stop()
    with open(os.path.join(victim.state_dir, "crashes"), "w") as crashes:
        crashes.write(("%d\n" % time.time()) * 3)
    victim.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1), "acknowledged")
    primary.kill()
    behind.start()
    assert cluster.primary() is victim
    client.commit(lambda root: root.update(number=2))
    client.close()
    primary.start()
    cluster.wait_healthy()
    check_histories(cluster, [b"acknowledged"])


def test_a_primary_that_is_stopped_hands_over_first(nodes):
    cluster = nodes.cluster().start()
    writer = Writer(cluster.addresses, "w")
    for _ in range(3):
        writer.wait_for_more(20)
        primary = cluster.primary()
        stopped = primary.log().count("stopped")
        primary.stop()
        assert "the switchover is done" in primary.log()
        assert primary.log().count("stopped") == stopped + 1
        assert cluster.primary() is not primary
        writer.wait_for_more(20)
        primary.start()
        cluster.wait_healthy()
    check_histories(cluster, writer.finish())


def is_registered(sock):
    """Registers as a client does that has been greeted."""
    send(sock, b"Z5")
    send(sock, call(1, "register", "1", False))
    sock.settimeout(30)
    answer = receive(sock)
    return answer and pickle.loads(answer)[:3] == (1, False, ".reply")


@pytest.mark.parametrize("comes_to", ["the primary", "another node"])
def test_a_client_that_has_not_registered_is_never_closed(nodes, comes_to):
    """A stock client tries a node that has closed its connection again only when all have, and one that is dead never
    does: it would wait until that one is back."""
    cluster = nodes.cluster().start()
    primary = cluster.primary()
    frozen, dead = [node for node in cluster.nodes if node is not primary]
    sock = connect((primary if comes_to == "the primary" else frozen).address)
    dead.kill()
    frozen.signal(signal.SIGSTOP)
    harness.wait_for("no primary", lambda: primary.status()["primary"] is None)
    frozen.signal(signal.SIGCONT)
    harness.wait_for("a primary", cluster.primary)
    assert is_registered(sock)
    sock.close()


def test_a_client_that_is_being_passed_on_waits_for_the_next_primary(nodes):
    cluster = nodes.cluster().start()
    primary = cluster.primary()
    replica = next(node for node in cluster.nodes if node is not primary)
    # It is greeted by the primary, through the replica.
    sock = connect(replica.address)
    primary.kill()
    assert is_registered(sock)
    sock.close()


@pytest.mark.parametrize("state", ["dead", "frozen"])
def test_clients_that_come_in_bad_moments_are_served(nodes, state):
    """One node is gone for good, and another one is frozen for a moment, again and again, while clients come."""
    cluster = nodes.cluster().start()
    primary = cluster.primary()
    shaky, gone = [node for node in cluster.nodes if node is not primary]
    Client(cluster.addresses).close()
    gone.kill() if state == "dead" else gone.signal(signal.SIGSTOP)
    done = []

    def commit(number):
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update({"client %d" % number: 1}))
        client.close()
        done.append(number)

    threads = []
    for number in range(24):
        if number % 4 == 0:
            shaky.signal(signal.SIGSTOP)
        threads.append(threading.Thread(target=commit, args=(number,), daemon=True))
        threads[-1].start()
        time.sleep(0.3)
        if number % 4 == 3:
            shaky.signal(signal.SIGCONT)
            time.sleep(0.5)
    for thread in threads:
        thread.join(60)
    if state == "frozen":
        gone.signal(signal.SIGCONT)
    assert sorted(done) == list(range(24))
