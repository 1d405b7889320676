"""What Standby is for, in one go: three places, stock clients, and what happens to them in a bad year."""

import os
import time

import pytest

import cluster as harness
from places import Places
from test_cluster import Writer, check_files, check_histories
from test_membership import shown, wait_for_voters
from test_switchover import count_disconnections
from zeo_client import Client, make_database

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def places():
    made = []

    def make(*names, **delays):
        made.append(Places(names, delays))
        return made[-1]

    yield make
    for places in made:
        places.close()


def sees(reader, key, number):
    """Waits until a reader has a value; a reader without server_sync is as fresh as its replica."""

    def found():
        reader.sync()
        return reader.root.get(key) == number

    harness.wait_for("%s = %s" % (key, number), found)


def test_three_places(places, nodes):
    world = places("office", "london", "paris", "rome", paris=40, rome=40)
    cluster = nodes.cluster(
        groups=["london", "london", "london", "paris", "rome"],
        places=world,
        options="  max-staleness 3600\n",
    )
    make_database(cluster.nodes[0].data_file, 1000)
    n4, n5 = cluster.nodes[3:]

    def year():
        cluster.start()
        n1 = cluster.nodes[0]
        writer = Writer(cluster.addresses, "w")
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(season=0))
        reader = Client([n4.read_only_address], read_only=True)
        lost = count_disconnections(reader.db.storage)
        writer.wait_for_more()

        # The primary dies: its own place goes on, and no other takes over.
        for season in (1, 2):
            primary = cluster.primary()
            primary.kill()
            killed = time.monotonic()
            writer.wait_for_more(1)
            print("primary killed: a commit after %.3f s" % (time.monotonic() - killed))
            client.commit(lambda root: root.update(season=season))
            assert cluster.primary().group == "london"
            primary.start()
            cluster.wait_healthy()
            sees(reader, "season", season)

        # A remote place is cut off: it serves what it has, and says how old that is.
        world.cut("paris")
        client.commit(lambda root: root.update(season=3))
        writer.wait_for_more()
        there = []

        def in_paris():
            local = Client([n4.read_only_address], read_only=True, server_sync=False)
            local.sync()
            there.append(local.root["season"])
            harness.wait_for(
                "the node to notice", lambda: shown(n4)["n4"]["state"] == "cut-off", timeout=10
            )
            harness.wait_for("its age", lambda: shown(n4)["n4"]["stale_seconds"] > 3)
            there.append(n4.ask("status"))
            local.close()

        world.run("paris", in_paris)
        assert there[0] == 2
        assert "cut-off" in there[1] and "s old" in there[1]
        assert cluster.primary().group == "london"
        sees(Client([n5.read_only_address], read_only=True), "season", 3)
        world.heal("paris")
        sees(reader, "season", 3)
        cluster.wait_healthy()

        # Maintenance: another node of the place becomes primary.
        before = cluster.primary()
        n1.ask("switchover")
        assert cluster.primary() is not before and cluster.primary().group == "london"
        client.commit(lambda root: root.update(season=4))
        sees(reader, "season", 4)

        # The whole place is to be left, and later returned to.
        n1.ask("group", "move", "--to", "paris")
        wait_for_voters(cluster, "n4")
        assert cluster.primary() is n4
        client.commit(lambda root: root.update(season=5))
        sees(reader, "season", 5)
        n5.ask("group", "move", "--to", "london")
        wait_for_voters(cluster, "n1", "n2", "n3")
        assert cluster.primary().group == "london"
        client.commit(lambda root: root.update(season=6))
        sees(reader, "season", 6)

        assert not lost or len(lost) == 1, "only the cut may have cost the reader its session"
        for close in (client, reader):
            close.close()
        check_histories(cluster, writer.finish())

    world.run("office", year)


def test_two_data_nodes_and_a_witness_in_three_places(places, nodes):
    """Each is killed in turn, and each is cut off in turn, so that no connection is closed."""
    world = places("office", "here", "there", "witness", there=5)
    cluster = nodes.cluster(groups=["here", "there", "witness"], places=world)
    n1 = cluster.nodes[0]

    def losses():
        cluster.failover = "here"
        for node in cluster.nodes:
            node.start()
        harness.wait_for("n2 to be there", lambda: shown(n1).get("n2", {}).get("state") == "up")
        n1.ask("group", "set", "there", "--failover", "on")
        wait_for_voters(cluster, "n1", "n2", "n3")
        writer = Writer(cluster.addresses, "w")
        for node in cluster.nodes:
            writer.wait_for_more()
            node.kill()
            writer.wait_for_more(10)
            node.start()
            level(cluster)
        for place in ("there", "witness", "here"):
            writer.wait_for_more()
            was_primary = cluster.primary().group == place
            world.cut(place)
            if was_primary:
                # A stock client cannot notice that; one that comes now finds the new primary.
                late = Client(cluster.addresses)
                late.commit(lambda root: root.update(without=place))
                late.close()
            else:
                writer.wait_for_more(10)
            world.heal(place)
            level(cluster)
            writer.wait_for_more(10)
        acknowledged = writer.finish()
        level(cluster)
        check_files(cluster, acknowledged)

    def level(cluster):
        def all_up():
            picture = cluster.status()
            up = [n for n in picture["nodes"] if n["state"] == "up" and n["lag_seconds"] <= 1]
            return picture["primary"] and len(up) == 3

        harness.wait_for("all to be up", all_up, timeout=60)

    world.run("office", losses)
