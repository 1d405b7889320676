"""Hosts that vanish, connections that are swallowed, descriptors that run out: rows 47 to 49."""

import os
import socket
import threading
import time

import pytest

import cluster as harness
from test_scenario import places  # noqa: F401  (a fixture)
from zeo_client import Client, Voted

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def in_places(places, nodes, test):
    """Runs a test on three nodes, each in a place of its own, with an office and a home for clients."""
    world = places("office", "home", "n1", "n2", "n3")
    cluster = nodes.cluster(places=world)

    def run():
        cluster.start()
        cluster.make_primary(cluster.nodes[0])
        test(world, cluster)

    world.run("office", run)


@needs_root
def test_row_49_the_locks_of_a_client_whose_host_vanishes_are_freed(places, nodes):
    def test(world, cluster):
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(x=1))
        oid = client.root._p_oid
        voted = []
        world.run("home", lambda: voted.append(Voted(cluster.addresses, oid)))
        world.cut("home")
        begun = time.monotonic()
        client.commit(lambda root: root.update(x=2))
        took = time.monotonic() - begun
        print("the locks were freed after %.1f s" % took)
        assert took < 25
        client.close()
        world.heal("home")
        voted[0].storage.close()

    in_places(places, nodes, test)


@needs_root
def test_row_49_a_forwarded_client_leaves_a_primary_that_vanishes(places, nodes):
    def test(world, cluster):
        n1, n2, n3 = cluster.nodes
        client = Client([n2.address])
        client.commit(lambda root: root.update(x=1))
        # So that the one which forwards is the next primary.
        n3.stop()
        n3.start()
        cluster.wait_healthy()
        world.cut("n1")
        begun = time.monotonic()
        client.commit(lambda root: root.update(x=2))
        took = time.monotonic() - begun
        print("the next commit came after %.1f s" % took)
        assert took < 20
        client.close()
        world.heal("n1")
        cluster.wait_healthy()

    in_places(places, nodes, test)


@needs_root
@pytest.mark.parametrize("where", ["the primary's", "all"])
def test_row_48_swallowed_connections_are_dialled_anew(places, nodes, where):
    def test(world, cluster):
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(x=1))
        names = ["n1"] if where == "the primary's" else ["n1", "n2", "n3"]
        assert all(world.swallow(name, "830") >= 4 for name in names)
        begun = time.monotonic()
        client.commit(lambda root: root.update(x=2))
        took = time.monotonic() - begun
        cluster.wait_healthy()
        print("the next commit came after %.1f s; all were well after %.1f s" % (took, time.monotonic() - begun))
        assert time.monotonic() - begun < 40
        client.commit(lambda root: root.update(x=3))
        client.close()

    in_places(places, nodes, test)


def commit_at_home(world, addresses):
    """A client at home commits: the thread that does it, and a list that gets the moment when it is done."""
    done = []

    def commit():
        far = Client(addresses, wait_timeout=120)
        far.commit(lambda root: root.update(x=2))
        done.append(time.monotonic())
        far.close()

    thread = threading.Thread(target=world.run, args=("home", commit), daemon=True)
    thread.start()
    return thread, done


@needs_root
@pytest.mark.parametrize("who", ["of the primary", "that is passed on"])
def test_row_49_a_client_that_was_cut_off_for_long_goes_on(places, nodes, who):
    """A stock client that waits for an answer sends nothing: if the end of its session does not reach it, it waits for
    ever."""

    def test(world, cluster):
        addresses = cluster.addresses if who == "of the primary" else [cluster.nodes[1].address]
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(x=1))
        oid = client.root._p_oid
        holder = Voted(cluster.addresses, oid)
        # Waits for the vote of the holder: nothing is to be sent meanwhile, in either direction.
        thread, done = commit_at_home(world, addresses)
        harness.wait_for("its vote to wait", lambda: client.db.storage.server_status()["waiting"] == 1)
        world.cut("home")
        time.sleep(16)
        holder.storage.tpc_abort(holder.txn)
        world.heal("home")
        healed = time.monotonic()
        thread.join(90)
        assert done, "it still waits"
        print("it went on %.1f s after the network was there again" % (done[0] - healed))
        holder.storage.close()
        client.close()

    in_places(places, nodes, test)


@needs_root
def test_row_49_a_client_that_is_held_while_it_is_cut_off_goes_on(places, nodes):
    def test(world, cluster):
        n1, n2, n3 = cluster.nodes
        for node in (n1, n3):
            node.stop()
        thread, done = commit_at_home(world, [n2.address])
        time.sleep(3)
        world.cut("home")
        time.sleep(16)
        world.heal("home")
        n1.start()
        n3.start()
        thread.join(60)
        assert done, "it still waits"

    in_places(places, nodes, test)


def silent(address, count):
    """Connections that say nothing, as many as are let in."""
    made = []
    for _ in range(count):
        try:
            made.append(socket.create_connection(address, timeout=5))
        except OSError:
            break
    return made


@pytest.mark.parametrize("kind", ["clients", "readers", "peers", "administrators"])
def test_row_47_descriptors_run_out_and_nothing_ends(nodes, kind):
    cluster = nodes.cluster()
    for node in cluster.nodes:
        node.within = ["prlimit", "--nofile=256:256"]
    cluster.start()
    primary = cluster.primary()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1))
    ports = dict(
        clients=primary.port,
        readers=primary.read_only_port,
        peers=primary.peer_port,
        administrators=primary.admin_port,
    )
    strangers = silent(("127.0.0.1", ports[kind]), 300)
    try:
        # With clients, time for a checkpoint.
        end = time.monotonic() + (12 if kind == "clients" else 3)
        number = 0
        while time.monotonic() < end:
            number += 1
            client.commit(lambda root: root.update(x=number))
            time.sleep(0.1)
        assert primary.process.poll() is None
        used = len(os.listdir("/proc/%d/fd" % primary.process.pid))
        print("%d descriptors of 256 are in use" % used)
        assert used < 256
        assert "too many connections of" in primary.log()
        assert "checkpoint: " not in primary.log()
    finally:
        for stranger in strangers:
            stranger.close()
    # Whoever comes now is served.
    Client([primary.address]).close()
    assert cluster.primary() is primary
    client.close()


def test_row_47_a_client_takes_one_descriptor(nodes):
    node = nodes.alone()
    node.start()
    client = Client([node.address])
    count = lambda: len(os.listdir("/proc/%d/fd" % node.process.pid))
    before = count()
    more = [Client([node.address]) for _ in range(10)]
    assert count() - before <= 10
    for each in more + [client]:
        each.close()


def test_a_stranger_that_asks_for_nothing_is_sent_away(nodes):
    node = nodes.alone()
    node.start()
    harness.wait_for("the node", node.listens)
    with socket.create_connection(node.address, timeout=60) as stranger:
        begun = time.monotonic()
        while stranger.recv(100):
            pass
        assert 15 < time.monotonic() - begun < 45
    assert "it has not asked for a storage within 20 seconds" in node.log()

