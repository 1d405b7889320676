"""`standby router`: stock clients with one address, whatever happens to the nodes behind it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import cluster as harness
from test_membership import replace_all, stopping  # noqa: F401 (a fixture)
from test_scenario import places, sees  # noqa: F401 (a fixture)
from test_transport import tls  # noqa: F401 (a fixture)
from zeo_client import Client

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def router(tmp_path):
    """Makes routers that are stopped after the test, whatever happens."""
    made = []

    def make(nodes, *arguments, **options):
        made.append(harness.Router(tmp_path / ("router%d" % len(made)), nodes, arguments, **options))
        return made[-1].start()

    yield make
    for each in made:
        each.kill()


def took(client, value):
    """The seconds that a commit takes, with the attempts that end in an error."""
    begun = time.monotonic()
    client.commit(lambda root: root.update(x=value))
    return time.monotonic() - begun


def test_one_address_leads_to_the_primary(nodes, router, encoding):
    cluster = nodes.cluster(zeo=encoding).start()
    # The second address of a node is nobody's.
    nowhere = ("127.0.0.1", harness.free_ports(1)[0])
    way = router([nowhere, cluster.nodes[0].address])
    client = Client([way.writes])
    reader = Client([way.reads], read_only=True)
    for value in range(3):
        primary = cluster.primary()
        print("after a kill: %.3f s" % [took(client, value), primary.kill(), took(client, value)][2])
        primary.start()
        cluster.wait_healthy()
    primary = cluster.primary()
    other = next(node for node in cluster.nodes if node is not primary)
    other.ask("switchover", "--to", other.name)
    print("after a switchover: %.3f s" % took(client, 10))
    other.stop()
    print("after SIGTERM: %.3f s" % took(client, 11))
    sees(reader, "x", 11)
    assert way.metric("accepted_total", clients="writers") >= 4
    assert "cannot connect" in way.log()
    client.close()
    reader.close()


def test_a_frozen_primary_is_left_in_time(nodes, router):
    cluster = nodes.cluster().start()
    way = router(cluster.addresses)
    client = Client([way.writes])
    took(client, 0)
    frozen = cluster.primary()
    harness.wait_for("it is watched", lambda: way.metric("node_primary", node=frozen.name) == 1)
    frozen.signal(signal.SIGSTOP)
    seconds = took(client, 1)
    print("after the primary froze: %.3f s" % seconds)
    assert seconds < 15
    assert "does not answer: connections to it are broken" in way.log()
    frozen.signal(signal.SIGCONT)
    cluster.wait_healthy()
    took(client, 2)
    client.close()


@needs_root
def test_a_host_that_vanishes_is_left_in_time(places, nodes, router):  # noqa: F811
    world = places("office", "n1", "n2", "n3")
    cluster = nodes.cluster(places=world)

    def run():
        cluster.start()
        cluster.make_primary(cluster.nodes[0])
        # One node is enough: the others are learned of.
        way = router([cluster.nodes[1].read_only_address], within=world.command("office"))
        client = Client([way.writes])
        reader = Client([way.reads], read_only=True)
        took(client, 0)
        world.cut("n1")
        print("after the host vanished: %.3f s" % took(client, 1))
        world.heal("n1")
        cluster.wait_healthy()
        sees(reader, "x", 1)
        # A replica that hears of nothing new, and that this machine reaches all the same, is left.
        primary = cluster.primary()
        replicas = [node for node in cluster.nodes if node is not primary]

        def read():
            return [n for n in replicas if way.metric("connections", address="%s:%s" % n.read_only_address) > 0]

        # It leaves the one that has become primary.
        (deaf,) = harness.wait_for("the reader is on a replica", read)
        others = [node.name for node in cluster.nodes if node is not deaf]
        world.deafen(deaf.name, *others)
        took(client, 2)
        sees(reader, "x", 2)
        world.undeafen(deaf.name, *others)
        client.close()
        reader.close()
        way.stop()

    world.run("office", run)


def test_all_nodes_are_replaced_under_it(stopping, router):  # noqa: F811
    cluster = stopping().start()
    way = router([cluster.nodes[0].address])
    client = Client([way.writes])
    took(client, 0)
    replace_all(cluster, added=lambda name: took(client, name))
    harness.wait_for("it knows", lambda: way.metric("node_answers") == 3)
    cluster.primary().kill()
    took(client, 1)
    client.close()


def test_readers_are_spread_and_come_back(nodes, router):
    cluster = nodes.cluster(groups=["here", "here", "here", "far"]).start()
    cluster.make_primary(cluster.nodes[0])
    way = router(cluster.addresses, "--group", "here")
    writer = Client([way.writes])
    took(writer, 0)
    harness.wait_for("all are watched", lambda: way.metric("node_answers") == 4)
    readers = [Client([way.reads], read_only=True) for _ in range(4)]

    def on(*numbers):
        return [way.metric("connections", address="%s:%s" % cluster.nodes[n].read_only_address) for n in numbers]

    assert on(0, 1, 2, 3) == [0, 2, 2, 0]
    for number in (1, 2):
        cluster.nodes[number].kill()
    harness.wait_for("the far group has them", lambda: on(0, 1, 2, 3) == [0, 0, 0, 4])
    for number in (1, 2):
        cluster.nodes[number].start()
    cluster.wait_healthy()
    harness.wait_for("they are back", lambda: sum(on(1, 2)) == 4)
    took(writer, 1)
    for reader in readers:
        sees(reader, "x", 1)
        reader.close()
    writer.close()


def test_sigterm_ends_connections_between_two_commits(nodes, router, tmp_path):
    cluster = nodes.cluster().start()
    path = str(tmp_path / "writes")
    way = router(cluster.addresses, writes=path)
    harness.wait_for("it listens", lambda: os.path.exists(path))
    client = Client(path)
    quiet = Client(path)
    took(client, 0)
    ending, errors, done = threading.Event(), [], [0]

    def commit():
        while not ending.is_set():
            try:
                client.commit(lambda root: root.update(x=done[0]), attempts=1)
                done[0] += 1
            except Exception as error:
                errors.append(error)
            # As applications do: not without a pause.
            time.sleep(0.3)

    thread = threading.Thread(target=commit)
    thread.start()
    harness.wait_for("commits", lambda: done[0] > 2)
    assert way.stop() == 0
    assert not os.path.exists(path)
    assert "connections end as soon as they are quiet" in way.log()
    assert "connections are broken" not in way.log()
    # Its successor takes the same address; the clients have waited for it.
    way.start()
    before = done[0]
    harness.wait_for("more commits", lambda: done[0] > before + 2)
    ending.set()
    thread.join()
    assert not errors
    took(quiet, "quiet")
    client.close()
    quiet.close()


def test_tls_passes_through(nodes, router, tls):  # noqa: F811
    cluster = nodes.cluster(zeo=tls.section(tls.folder)).start()
    files = ["--tls-certificate", tls.known[1], "--tls-key", tls.known[0], "--tls-authenticate", tls.server[1]]
    way = router(cluster.addresses, *map(str, files))
    client = Client([way.writes], ssl=tls.client(tls.issued))
    took(client, 0)
    cluster.primary().kill()
    took(client, 1)
    client.close()
    blind = router(cluster.addresses)
    harness.wait_for("a complaint", lambda: "--tls-certificate" in blind.log())


def test_nodes_of_another_cluster_are_left_out(nodes, router):
    ours = nodes.cluster().start()
    other = nodes.cluster(name="other", count=1)
    other.nodes[0].configure(open(other.nodes[0].config_path).read().split("<standby>")[1].join(["<standby>", ""]))
    text = open(other.nodes[0].config_path).read().replace("cluster test", "cluster library")
    with open(other.nodes[0].config_path, "w") as config:
        config.write(text)
    other.start()
    wrong = other.nodes[0].address
    way = router([wrong, *ours.addresses], "--cluster", "test")
    client = Client([way.writes])
    took(client, 0)
    assert ours.primary().status() is not None
    harness.wait_for("a complaint", lambda: "is left out. Is one of the addresses wrong?" in way.log())
    assert '"library"' in way.log()
    client.close()
    reader = Client([ours.primary().address])
    assert reader.root["x"] == 0
    reader.close()


def test_a_server_without_a_cluster_is_used_as_it_is(router, tmp_path):
    port = harness.free_ports(1)[0]

    class RunZeo(harness.Process):
        def command(self):
            file = os.path.join(self.directory, "Data.fs")
            return [sys.executable, "-m", "ZEO.runzeo", "-a", "127.0.0.1:%d" % port, "-f", file]

    server = RunZeo(tmp_path / "runzeo").start()
    try:
        way = router([("127.0.0.1", port)])
        client = Client([way.writes])
        reader = Client([way.reads], read_only=True)
        took(client, 0)
        sees(reader, "x", 0)
        # Nobody could take its place: its connections are not broken.
        server.signal(signal.SIGSTOP)
        harness.wait_for("silence", lambda: "no sign of life" in way.log())
        server.signal(signal.SIGCONT)
        harness.wait_for("an answer", lambda: way.get("/health")[0] == 200)
        client.commit(lambda root: root.update(x=1), attempts=1)
        assert way.log().count("is no node of a Standby cluster") <= 2
        client.close()
        reader.close()
    finally:
        server.kill()


def test_clients_wait_while_nobody_answers(nodes, router):
    cluster = nodes.cluster()
    way = router(cluster.addresses)
    harness.wait_for("it listens", lambda: "writers connect to" in way.log())
    assert way.get("/health") == (503, "no primary answers\n")
    opened = []
    thread = threading.Thread(target=lambda: opened.append(Client([way.writes])))
    thread.start()
    harness.wait_for("it is held", lambda: way.metric("held", clients="writers") == 1)
    cluster.start()
    thread.join(30)
    took(opened[0], 0)
    harness.wait_for("health", lambda: way.get("/health") == (200, "ok\n"))
    assert way.metric("held") == 0
    opened[0].close()


def test_what_strangers_send_is_not_kept(nodes, router):
    way = router([("127.0.0.1", harness.free_ports(1)[0])])
    harness.wait_for("it listens", lambda: "writers connect to" in way.log())
    with contextlib.closing(socket.create_connection(way.writes)) as sock:
        sock.settimeout(1)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 200 << 20:
                sent += sock.send(b"x" * (1 << 20))
        # As much as the kernel holds, and 64 KiB: then it was closed.
        assert sent < 64 << 20
        harness.wait_for("it is closed", lambda: way.metric("ended_total", reason="closed") == 1)
    assert way.metric("held") == 0


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--writes", "127.0.0.1:8100"], "--node <HOST:PORT>"),
        (["--node", "db1:8100"], "--writes <ADDRESS>"),
        (["--node", ":8100", "--writes", "127.0.0.1:1"], "a host is missing"),
        (["--node", "db1", "--writes", "127.0.0.1:1"], "is not an address: HOST:PORT"),
        (["--node", "db1:1", "--writes", "127.0.0.1:1", "--max-lag", "0"], "--max-lag 0: 0.1 to 3600"),
        (["--node", "db1:1", "--writes", "127.0.0.1:1", "--dead-after", "0"], "0.2 to 3600 seconds are possible"),
        (["--node", "db1:1", "--writes", "127.0.0.1:1", "--tls-key", "/x"], "--tls-certificate <FILE>"),
        (
            ["--node", "db1:1", "--reads", "127.0.0.1:1", "--tls-certificate", "/no/a", "--tls-authenticate", "/no/b"],
            "/no/a",
        ),
        (["--node", "db1:1", "--writes", "192.0.2.1:1"], "cannot listen on address 192.0.2.1:1"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(arguments, complaint):
    command = [harness.STANDBY, "router", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert complaint in done.stderr, done.stderr
