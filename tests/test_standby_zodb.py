"""The Python package: it is installed as users install it, and followed while the cluster changes under it."""

import os
import time

import pytest
import transaction
import ZODB
import ZODB.config

import cluster as harness
from test_membership import replace_all, stopping  # noqa: F401 (a fixture)
from test_scenario import places, sees  # noqa: F401 (a fixture)
from zeo_client import Client, is_passing

standby_zodb = pytest.importorskip("standby_zodb", reason="the package is not installed: pip install ./python")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def test_it_is_the_installed_package():
    assert "site-packages" in standby_zodb.__file__


class Follower(Client):
    """A client that is never reopened, with the package's storage."""

    def __init__(self, addresses, **options):
        options.setdefault("server_sync", True)
        self.manager = transaction.TransactionManager(explicit=False)
        self.db = ZODB.DB(standby_zodb.ClientStorage(addresses, **options))
        self.connection = self.db.open(self.manager)

    @property
    def storage(self):
        return self.db.storage

    @property
    def names(self):
        return {node.name for node in self.storage.topology.nodes}


def peer(storage):
    """The port of the node to which a storage is connected."""
    return storage._transport.get_extra_info("peername")[1] if storage._transport else None


def test_it_goes_on_after_all_nodes_that_it_was_given_are_gone(stopping, encoding):  # noqa: F811
    cluster = stopping(zeo=encoding).start()
    first = cluster.nodes[0]
    client = Follower([first.address])
    client.commit(lambda root: root.update(x=0))
    assert client.storage.topology.cluster == "test" and client.names == {"n1", "n2", "n3"}
    replace_all(
        cluster,
        options=lambda name: dict(zeo=encoding),
        added=lambda name: client.commit(lambda root: root.update(x=name)),
    )
    harness.wait_for("the client knows", lambda: client.names == {"n4", "n5", "n6"})
    for number in range(10, 13):
        client.commit(lambda root: root.update(x=number))
        killed = cluster.primary()
        killed.kill()
        client.commit(lambda root: root.update(x=number))
        killed.start()
        cluster.wait_healthy()
    assert client.root["x"] == 12
    client.close()


def test_readers_choose_among_the_nodes(nodes):
    cluster = nodes.cluster(groups=["here", "here", "far", "far"]).start()
    cluster.make_primary(cluster.nodes[0])
    writer = Follower(cluster.addresses)
    writer.commit(lambda root: root.update(x=1))
    seed = [cluster.nodes[0].read_only_address]

    def ports(*numbers):
        return {cluster.nodes[number].read_only_port for number in numbers}

    for prefer, expected in (
        ("replica", ports(1, 2, 3)),
        ("group:far", ports(2, 3)),
        ("nearest", ports(0, 1, 2, 3)),
        # There is none: any node will do.
        ("group:nowhere", ports(0, 1, 2, 3)),
    ):
        reader = Follower(seed, read_only=True, prefer=prefer)
        assert peer(reader.storage) in expected, prefer
        assert reader.root["x"] == 1
        reader.close()
    # The places that it prefers are lost: it goes on elsewhere.
    reader = Follower(seed, read_only=True, prefer="group:far")
    for node in cluster.nodes[2:]:
        node.kill()
    harness.wait_for("another node", lambda: peer(reader.storage) in ports(0, 1))
    writer.commit(lambda root: root.update(x=2))
    sees(reader, "x", 2)
    # They are back: so is the reader, while it reads.
    for node in cluster.nodes[2:]:
        node.start()

    def reads_there():
        reader.connection.cacheMinimize()
        assert reader.root["x"] == 2
        return peer(reader.storage) in ports(2, 3)

    harness.wait_for("a node that it prefers", reads_there)
    reader.close()
    writer.close()


def test_a_preference_that_cannot_be(nodes):
    with pytest.raises(ValueError, match="needs read_only"):
        standby_zodb.ClientStorage(("127.0.0.1", 1), prefer="replica")
    for wrong in ("fastest", "group:", "primary:here", ""):
        with pytest.raises(ValueError, match="may be primary, replica, nearest or group:NAME"):
            standby_zodb.ClientStorage(("127.0.0.1", 1), prefer=wrong, read_only=True)


def test_a_server_without_a_cluster_is_an_ordinary_one(nodes, caplog):
    alone = nodes.alone().start()
    with caplog.at_level("INFO", logger="standby_zodb"):
        client = Follower([alone.address])
        for number in range(3):
            client.commit(lambda root: root.update(x=number))
            alone.stop()
            alone.start()
        client.commit(lambda root: root.update(x=3))
    assert client.storage.topology is None
    said = [record for record in caplog.records if "no node of a Standby cluster" in record.message]
    assert len(said) == 1
    client.close()


@pytest.mark.parametrize(
    "told, problem",
    [
        ({"version": 2}, "version 2"),
        ({"version": 1, "cluster": "c"}, "not the form"),
        ("nonsense", "not the form"),
        (
            {"version": 1, "cluster": "c", "cluster_id": "77", "timeline": 1, "term": 1, "primary": None, "nodes": [{"node": "n1"}]},
            "a node in it",
        ),
        (
            {
                "version": 1,
                "cluster": "c",
                "cluster_id": "77",
                "timeline": 1,
                "term": 1,
                "primary": None,
                "nodes": [
                    {
                        "node": "n1",
                        "group": "g",
                        "role": "replica",
                        "state": "up",
                        "address": "no port",
                        "read_only_address": "",
                    }
                ],
            },
            "is not an address",
        ),
    ],
)
def test_what_is_not_understood_is_not_followed(told, problem):
    with pytest.raises(ValueError, match=problem):
        standby_zodb.Topology.read(told)


def test_an_address_that_a_node_has_not_heard_of_yet_is_kept():
    def told(*nodes):
        return standby_zodb.Topology.read(
            {
                "version": 1,
                "cluster": "c",
                "cluster_id": "77",
                "timeline": 1,
                "term": 1,
                "primary": "n1",
                "nodes": [
                    {
                        "node": name,
                        "group": "g",
                        "role": "replica",
                        "state": "up",
                        "address": address,
                        "read_only_address": "",
                    }
                    for name, address in nodes
                ],
            }
        )

    former = told(("n1", "db1:8100"), ("n2", "db2:8100"), ("n3", "db3:8100"))
    now = told(("n1", "db9:8100"), ("n2", "")).completed_by(former)
    assert [node.address for node in now.nodes] == [("db9", 8100), ("db2", 8100)]
    assert told(("n2", "")).completed_by(None).nodes[0].address is None


def test_a_node_of_another_cluster_is_left(nodes, caplog):
    """Both have the same name: somebody has bootstrapped twice."""
    cluster, other = nodes.cluster(count=1).start(), nodes.cluster("other", count=1)
    other.start()
    client = Follower([cluster.nodes[0].address, other.nodes[0].address])
    known = client.storage.topology.cluster_id
    at_first = peer(client.storage) == cluster.nodes[0].port
    first, second = (cluster, other) if at_first else (other, cluster)
    client.commit(lambda root: root.update(x=1))
    # ZEO itself leaves a server that is behind what it knows.
    stranger = Client(second.addresses)
    stranger.commit(lambda root: root.update(x=2))
    stranger.close()
    first.nodes[0].stop()
    with caplog.at_level("ERROR", logger="standby_zodb"):
        harness.wait_for("an error", lambda: "belongs to cluster" in caplog.text)
    assert client.storage.topology.cluster_id == known
    first.nodes[0].start()
    harness.wait_for("its own cluster", lambda: peer(client.storage) == first.nodes[0].port)
    client.commit(lambda root: root.update(y=1))
    assert client.root["x"] == 1
    client.close()


def test_zconfig_and_uri(nodes):
    from zodburi import resolve_uri

    cluster = nodes.cluster().start()
    port = cluster.nodes[1].port
    database = ZODB.config.databaseFromString(
        "%%import standby_zodb\n<zodb>\n<standbyclient>\nserver 127.0.0.1:%d\nserver-sync true\n"
        "client-label web\n</standbyclient>\n</zodb>" % port
    )
    assert type(database.storage) is standby_zodb.ClientStorage
    with database.transaction() as connection:
        connection.root()["x"] = 1
    assert "web" in "".join(node.log() for node in cluster.nodes)
    database.close()
    for prefer in ("replica", "group:x"):
        with pytest.raises(Exception, match="needs read-only"):
            ZODB.config.storageFromString(
                "%%import standby_zodb\n<standbyclient>\nserver 127.0.0.1:1\nprefer %s\n</standbyclient>" % prefer
            )
    factory, options = resolve_uri(
        "standby://127.0.0.1,127.0.0.1:%d/?storage=1&wait_timeout=20&server_sync=true&cache_size=1MB"
        "&connection_cache_size=77" % port
    )
    assert options["cache_size"] == 77
    storage = factory()
    database = ZODB.DB(storage, **options)
    with database.transaction() as connection:
        assert connection.root()["x"] == 1
    database.close()
    for wrong, problem in (
        ("standby:///var/run/zeo.sock", "is not of the form"),
        ("standby://db1:http/", "is not an address"),
        ("standby://db1/?wait=maybe", "neither true nor false"),
        ("standby://db1/?prefer=fast", "may be primary"),
    ):
        with pytest.raises(ValueError, match=problem):
            resolve_uri(wrong)


@needs_root
def test_a_vanished_host_is_noticed_in_three_seconds(places, nodes):  # noqa: F811
    """ZEO's own client waits for minutes: it has nothing to send, and asks nobody."""
    world = places("office", "n1", "n2", "n3")
    cluster = nodes.cluster(places=world)

    def test():
        cluster.start()
        cluster.make_primary(cluster.nodes[0])
        client = Follower(cluster.addresses)
        client.commit(lambda root: root.update(x=0))
        generation = client.storage._connection_generation
        world.cut("n1")
        begun = time.monotonic()
        # It does nothing, and notices all the same.
        harness.wait_for("a lost connection", lambda: client.storage._connection_generation != generation)
        noticed = time.monotonic() - begun
        client.commit(lambda root: root.update(x=1))
        print("noticed after %.1f s, committed after %.1f s" % (noticed, time.monotonic() - begun))
        client.close()
        world.heal("n1")

    world.run("office", test)


def test_commits_under_repeated_kills(nodes):
    cluster = nodes.cluster().start()
    client = Follower(cluster.addresses[:1])
    client.commit(lambda root: root.update(x=0))
    for _ in range(4):
        for number in range(20):
            client.commit(lambda root: root.update(x=root["x"] + 1))
        killed = cluster.primary()
        killed.kill()
        client.commit(lambda root: root.update(x=root["x"] + 1))
        killed.start()
        cluster.wait_healthy()
    # A commit whose answer was lost may count twice, never not at all.
    assert client.root["x"] >= 84
    client.close()


def test_closing_while_nobody_is_there(nodes):
    cluster = nodes.cluster().start()
    client = Follower(cluster.addresses, wait_timeout=1)
    client.commit(lambda root: root.update(x=0))
    for node in cluster.nodes:
        node.kill()
    try:
        client.commit(lambda root: root.update(x=1), attempts=1)
    except Exception as error:
        assert is_passing(error), error
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 20
