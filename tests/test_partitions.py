"""Nodes and clients that cannot reach each other, fully, partly, or one way."""

import os
import threading
import time

import pytest

import cluster as harness
from test_cluster import Writer, check_files
from test_membership import shown
from test_scenario import places  # noqa: F401  (a fixture)
from zeo_client import Client

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def one_each(places, nodes, test):
    """Runs a test on three nodes, each in a place of its own, and a fourth place for clients."""
    world = places("office", "a", "b", "c")
    cluster = nodes.cluster(groups=["a", "b", "c"], places=world)

    def run():
        for node in cluster.nodes:
            node.start()
        n1 = cluster.nodes[0]
        harness.wait_for(
            "nodes", lambda: [n["state"] for n in shown(n1).values()] == ["up"] * 3, timeout=60
        )
        for group in ("b", "c"):
            n1.ask("group", "set", group, "--failover", "on")
        test(world, cluster)
        harness.wait_for("all to be level", lambda: level(cluster), timeout=60)
        check_files(cluster, [])

    world.run("office", run)


def level(cluster):
    picture = cluster.status()
    tids = {str(n["last_tid"]) for n in picture["nodes"] if n["state"] == "up"}
    return picture["primary"] and len(tids) == 1 and all(n["state"] == "up" for n in picture["nodes"])


def write_there(world, cluster, primary, answers):
    """A client beside a primary that is cut off tries to commit."""

    def write():
        client = Client([primary.address], wait_timeout=3)
        try:
            client.manager.begin()
            client.root["lost"] = 1
            answers.append("begun")
            while len(answers) < 2:
                time.sleep(0.01)
            client.manager.commit()
            answers.append("acknowledged")
        except Exception as error:
            answers.append(type(error).__name__)
            client.manager.abort()

    thread = threading.Thread(target=lambda: world.run(primary.group, write), daemon=True)
    thread.start()
    harness.wait_for("a client there", lambda: answers)
    return thread


def test_row_1_a_primary_without_a_majority_acknowledges_nothing(places, nodes):
    def test(world, cluster):
        primary = cluster.primary()
        answers = []
        Client(cluster.addresses).commit(lambda root: root.update(number=0))
        thread = write_there(world, cluster, primary, answers)
        world.cut(primary.group)
        answers.append("cut")
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(number=1))
        thread.join(30)
        assert answers[2:] not in ([], ["acknowledged"]), answers
        world.heal(primary.group)
        client.commit(lambda root: root.update(number=2))
        assert "lost" not in client.root
        client.close()

    one_each(places, nodes, test)


def test_row_2_a_partial_partition_changes_nothing_and_nobody_flaps(places, nodes):
    def test(world, cluster):
        primary = cluster.primary()
        other = next(node for node in cluster.nodes if node is not primary)
        writer = Writer(cluster.addresses, "w")
        term = cluster.status()["term"]
        world.deafen(primary.group, other.group)
        world.deafen(other.group, primary.group)
        for _ in range(5):
            time.sleep(1)
            writer.wait_for_more()
        assert cluster.status()["term"] <= term + 1
        assert cluster.primary() is primary
        world.undeafen(primary.group, other.group)
        world.undeafen(other.group, primary.group)
        writer.finish()

    one_each(places, nodes, test)


def test_row_3_a_primary_that_hears_nothing_steps_down(places, nodes):
    def test(world, cluster):
        primary = cluster.primary()
        others = [node.group for node in cluster.nodes if node is not primary]
        Client(cluster.addresses).commit(lambda root: root.update(number=0))
        answers = []
        thread = write_there(world, cluster, primary, answers)
        world.deafen(primary.group, *others, "office")
        answers.append("deaf")
        started = time.monotonic()
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(number=1))
        print("a primary that hears nothing: a commit elsewhere after %.1f s" % (time.monotonic() - started))
        thread.join(30)
        assert answers[2:] not in ([], ["acknowledged"]), answers
        world.undeafen(primary.group, *others, "office")
        # What it sent meanwhile may be in the log or not: the client knows that it does not know.
        client.commit(lambda root: root.update(number=2))
        client.close()

    one_each(places, nodes, test)


def test_row_4_clients_cut_from_the_primary_are_passed_on(places, nodes):
    def test(world, cluster):
        primary = cluster.primary()
        term = cluster.status()["term"]
        world.deafen(primary.group, "office")
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(number=1))
        other = next(node for node in cluster.nodes if node is not primary)
        assert other.status()["primary"] == primary.name
        assert other.status()["term"] == term
        client.close()
        world.undeafen(primary.group, "office")

    one_each(places, nodes, test)


@pytest.mark.parametrize("profile", ["lan", "auto"])
def test_row_51_round_trips_of_a_second(places, nodes, profile):
    world = places("office", "n1", "n2", "n3", n1=0, n2=0, n3=0)
    cluster = nodes.cluster(places=world, options="  profile %s\n" % profile)

    def slow(delay):
        for node in cluster.nodes:
            # Between two nodes there are two cables, there and back.
            world.set_wire(node.name, delay)

    def serves():
        picture = cluster.status()
        return picture and any(n["role"] == "primary" and not n["no_lease"] for n in picture["nodes"])

    def run():
        cluster.start()
        client = Client(cluster.addresses)
        client.commit(lambda root: root.update(x=1))
        # With "lan": longer than a lease, shorter than an election timeout, so that whoever leads goes on leading.
        slow(180 if profile == "lan" else 250)
        if profile == "lan":
            said = "a majority answers too late for it to serve"
            harness.wait_for("it to be said", lambda: any(said in n.log() for n in cluster.nodes), timeout=90)
            harness.wait_for("the status to say it", lambda: cluster.status() and not serves())
            slow(0)
        begun = time.monotonic()
        for number in range(5):
            client.commit(lambda root: root.update(x=number), attempts=1000)
        print("five commits took %.1f s" % (time.monotonic() - begun))
        if profile == "auto":
            cluster.primary().kill()
            begun = time.monotonic()
            client.commit(lambda root: root.update(x=6), attempts=1000)
            print("after a kill a commit took %.1f s" % (time.monotonic() - begun))
            slow(0)
        for node in cluster.nodes:
            if node.process is None:
                node.start()
        cluster.wait_healthy()
        cluster.wait_level()
        client.close()

    world.run("office", run)
    check_files(cluster, [])
