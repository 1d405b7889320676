"""Groups, witnesses, and nodes that come and go while stock clients commit."""

import os
import shutil
import time

import pytest

import cluster as harness
from test_cluster import Writer, check_histories
from zeo_client import Client


def shown(node):
    """The nodes as one of them shows them, by name."""
    picture = node.status()
    return {n["node"]: n for n in picture["nodes"]} if picture else {}


def wait_for_voters(cluster, *names):
    def voters():
        picture = cluster.status()
        return picture and {n["node"] for n in picture["nodes"] if n["voter"]} == set(names)

    harness.wait_for("voters %s" % (names,), voters)


def new_node(cluster, tmp_path, name, printed, group="here", witness=False):
    """A node that joins as `node add` has said."""
    return cluster.invited(tmp_path / "cluster" / name, name, printed, group=group, witness=witness)


def replace_all(cluster, options=lambda name: {}, added=lambda name: None):
    """Adds n4, n5 and n6, one of which becomes primary, and removes n1, n2 and n3. `options` gives those of a new node,
    and `added` is called with each."""
    former = list(cluster.nodes)
    for name in ("n4", "n5", "n6"):
        printed = cluster.primary().ask("node", "add", name)
        cluster.invited(os.path.join(cluster.directory, name), name, printed, **options(name)).start()
        wait_for_voters(cluster, *(node.name for node in cluster.nodes))
        added(name)
    cluster.make_primary(cluster.named("n5"))
    for gone in former:
        cluster.named("n5").ask("node", "remove", gone.name, "--force")
        gone.kill()
        cluster.nodes.remove(gone)
    wait_for_voters(cluster, "n4", "n5", "n6")


@pytest.fixture
def stopping(nodes):
    """Clusters whose nodes are stopped after the test, those that joined later included."""
    made = []

    def make(**options):
        made.append(nodes.cluster(**options))
        return made[-1]

    yield make
    for cluster in made:
        for node in cluster.nodes:
            node.kill()


@pytest.mark.parametrize("lost", ["n1", "n2", "n3"])
def test_row_19_two_data_nodes_and_a_witness_survive_any_single_failure(stopping, lost):
    cluster = stopping(groups=["here", "here", "witness"]).start()
    writer = Writer(cluster.addresses, "w")
    for _ in range(2):
        writer.wait_for_more()
        node = cluster.named(lost)
        node.kill()
        killed = time.monotonic()
        writer.wait_for_more(20)
        assert time.monotonic() - killed < 6
        assert cluster.primary().name != "n3"
        status = cluster.primary().ask("status")
        assert "the next failure stops writes" in status
        node.start()
        cluster.wait_healthy()
    check_histories(cluster, writer.finish())
    assert not os.path.exists(cluster.named("n3").data_file)
    logs = [os.path.join(d, f) for d, _, fs in os.walk(cluster.named("n3").state_dir) for f in fs]
    for path in logs:
        with open(path, "rb") as file:
            assert b"PersistentMapping" not in file.read(), "a witness holds no data"


def test_row_18_two_nodes_are_told_that_they_survive_nothing(stopping):
    cluster = stopping(count=2).start()
    assert "no fault tolerance" in cluster.nodes[0].ask("status")
    assert "witness" in cluster.nodes[0].ask("status")
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    # The other has taken the commit, but does not know yet that it has been acknowledged.
    cluster.wait_level()
    lost = cluster.primary()
    lost.kill()
    (left,) = cluster.running()
    reader = Client([left.read_only_address], read_only=True)
    assert reader.root["number"] == 1
    time.sleep(3)
    assert left.status()["primary"] is None
    lost.start()
    client.commit(lambda root: root.update(number=2))
    reader.sync()
    assert reader.root["number"] == 2


def test_remote_groups_never_take_over_and_follow(stopping):
    cluster = stopping(groups=["here", "here", "here", "far", "further"]).start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=0))
    for number in range(1, 4):
        primary = cluster.primary()
        primary.kill()
        client.commit(lambda root: root.update(number=number))
        assert cluster.primary().group == "here"
        primary.start()
        cluster.wait_healthy()
    cluster.wait_level()
    for node in cluster.nodes[:3]:
        node.kill()
    # A client that is held there all the same comes through when a primary is back.
    time.sleep(3)
    for node in cluster.nodes[3:]:
        state = shown(node)[node.name]
        assert (state["role"], state["voter"]) == ("replica", False)
        reader = Client([node.read_only_address], read_only=True)
        assert reader.root["number"] == 3
        reader.close()
    for node in cluster.nodes[:3]:
        node.start()
    client.commit(lambda root: root.update(number=4))
    client.close()
    check_histories(cluster, [])


def test_a_group_is_moved_to_and_back(stopping):
    cluster = stopping(groups=["here", "here", "here", "far", "far", "far"]).start()
    writer = Writer(cluster.addresses, "w")
    writer.wait_for_more()
    n1 = cluster.nodes[0]
    moved = n1.ask("group", "move", "--to", "far")
    assert "done: " in moved
    assert cluster.primary().group == "far"
    cluster.failover = "far"
    cluster.wait_healthy()
    writer.wait_for_more()
    # It is the place that fails over by itself now.
    before = cluster.primary()
    before.kill()
    writer.wait_for_more()
    assert cluster.primary().group == "far"
    before.start()
    cluster.wait_healthy()
    n1.ask("group", "move", "--to", "here")
    cluster.failover = "here"
    cluster.wait_healthy()
    assert cluster.primary().group == "here"
    check_histories(cluster, writer.finish())


def test_votes_are_given_and_taken(stopping):
    cluster = stopping(groups=["here", "here", "here", "far", "far"]).start()
    n1 = cluster.nodes[0]
    assert "vote" in n1.ask("group", "set", "far", "--failover", "on")
    wait_for_voters(cluster, "n1", "n2", "n3", "n4", "n5")
    refused = n1.ask("group", "set", "far", "--failover", "off", fails=True)
    assert "3 voters would be left, which survive 1 failure(s) instead of 2" in refused
    n1.ask("group", "set", "far", "--failover", "off", "--force")
    wait_for_voters(cluster, "n1", "n2", "n3")
    assert "the primary is in group here" in n1.ask(
        "group", "set", "here", "--failover", "off", "--force", fails=True
    )
    assert "no node is of group mars; the groups are far, here" in n1.ask(
        "group", "set", "mars", "--failover", "on", fails=True
    )


def test_nodes_are_added_replaced_and_removed_while_clients_commit(stopping, tmp_path):
    cluster = stopping().start()
    writer = Writer(cluster.addresses, "w")
    writer.wait_for_more()
    n1 = cluster.nodes[0]
    # Not without a token.
    stranger = new_node(cluster, tmp_path, "n4", "join  127.0.0.1:%s join-token wrong" % n1.peer_port)
    stranger.start()
    harness.wait_for("a warning", lambda: "is not invited" in cluster.primary().log())
    assert len(cluster.status()["nodes"]) <= 4 and not shown(n1).get("n4", {}).get("voter")
    stranger.kill()
    cluster.nodes.remove(stranger)
    shutil.rmtree(stranger.directory)

    n4 = new_node(cluster, tmp_path, "n4", n1.ask("node", "add", "n4", "--group", "here"))
    n4.start()
    wait_for_voters(cluster, "n1", "n2", "n3", "n4")
    assert "n4 is a member already" in n1.ask("node", "add", "n4", fails=True)
    # Its disk is lost: it is recognised, begins as a learner, and votes again.
    n4.kill()
    shutil.rmtree(n4.state_dir)
    os.remove(n4.data_file)
    n4.start()
    harness.wait_for("a new identity", lambda: "begins anew" in cluster.primary().log())
    cluster.wait_healthy()
    writer.wait_for_more()
    # Another machine takes its name, while it is still there.
    printed = n1.ask("node", "replace", "n4")
    cluster.nodes.remove(n4)
    other = new_node(cluster, tmp_path, "n4", printed)
    other.directory = str(tmp_path / "other")
    os.makedirs(other.directory)
    other.data_file = os.path.join(other.directory, "Data.fs")
    other.state_dir = os.path.join(other.directory, "state")
    other.join(
        "test", "  join 127.0.0.1:%s\n  join-token %s\n" % (n1.peer_port, harness.token_of(printed))
    )
    other.start()
    try:
        harness.wait_for(
            "the new n4",
            lambda: shown(n1).get("n4", {}).get("peer_address") == "127.0.0.1:%s" % other.peer_port,
        )
    finally:
        n4.kill()
    cluster.wait_healthy()
    writer.wait_for_more()
    # The primary cannot be removed; any other can.
    primary = cluster.primary()
    assert "first make another node primary" in n1.ask("node", "remove", primary.name, fails=True)
    gone = next(node for node in cluster.nodes[:3] if node is not primary)
    left = [node for node in cluster.nodes if node is not gone]
    assert "no member" in primary.ask("node", "remove", gone.name)
    wait_for_voters(cluster, *(node.name for node in left))
    harness.wait_for("its log to say so", lambda: "was removed from the cluster" in gone.log())
    harness.wait_for("it to be gone", lambda: gone.name not in shown(primary))
    # It does not come back by itself.
    time.sleep(1)
    assert gone.name not in shown(primary)
    gone.kill()
    time.sleep(1)
    assert gone.name not in shown(primary)
    cluster.nodes = left
    refused = primary.ask("node", "remove", left[0].name, fails=True) if primary is not left[0] else (
        primary.ask("node", "remove", left[1].name, fails=True)
    )
    assert "2 voters would be left, which survive 0 failure(s) instead of 1" in refused
    check_histories(cluster, writer.finish())


def test_a_removal_that_stops_writes_is_refused(stopping):
    cluster = stopping().start()
    primary = cluster.primary()
    others = [node for node in cluster.nodes if node is not primary]
    others[0].kill()
    harness.wait_for("it to be down", lambda: shown(primary)[others[0].name]["state"] == "down")
    time.sleep(1)
    refused = primary.ask("node", "remove", others[1].name, fails=True)
    assert "2 voters would be left, of which only 1 are up: writes would stop at once" in refused
    # To remove the one that is down keeps what there is.
    assert "--force" in primary.ask("node", "remove", others[0].name, fails=True)
    primary.ask("node", "remove", others[0].name, "--force")
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))


def test_a_witness_is_added_later(stopping, tmp_path):
    cluster = stopping(count=2).start()
    printed = cluster.nodes[0].ask("node", "add", "w", "--group", "third", "--witness")
    witness = new_node(cluster, tmp_path, "w", printed, group="third", witness=True)
    witness.start()
    wait_for_voters(cluster, "n1", "n2", "w")
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.primary().kill()
    client.commit(lambda root: root.update(number=2))
    assert "is a witness" in cluster.primary().ask("switchover", "--to", "w", fails=True)


def test_row_31_a_copied_disk_is_refused(stopping, tmp_path):
    cluster = stopping().start()
    n3 = next(node for node in cluster.nodes if node is not cluster.primary())
    n3.stop()
    copy = harness.Node(tmp_path / "copy", n3.name)
    shutil.copytree(n3.state_dir, copy.state_dir)
    shutil.copy(n3.data_file, copy.data_file)
    members = "".join(
        "  member %s 127.0.0.1:%s here\n"
        % (node.name, copy.peer_port if node is n3 else node.peer_port)
        for node in cluster.nodes
    )
    copy.join("test", members)
    n3.start()
    cluster.wait_healthy()
    copy.start()
    try:
        harness.wait_for("its log to say so", lambda: "was its disk copied?" in copy.log())
        cluster.wait_healthy()
    finally:
        copy.kill()


def test_a_replica_that_is_cut_off_says_how_old_it_is_and_may_refuse(stopping):
    cluster = stopping(
        groups=["here", "here", "here", "far"], options="  max-staleness 4\n"
    ).start()
    far = cluster.nodes[3]
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.wait_level()
    reader = Client([far.read_only_address], read_only=True)
    assert shown(far)["n4"]["stale_seconds"] < 2
    for node in cluster.nodes[:3]:
        node.kill()
    harness.wait_for("age", lambda: shown(far)["n4"]["stale_seconds"] > 2)
    assert shown(far)["n4"]["state"] == "cut-off"
    reader.sync()
    assert reader.root["number"] == 1
    harness.wait_for("a refusal", lambda: "readers are refused" in far.log())
    for node in cluster.nodes[:3]:
        node.start()
    # The reader's own connection waits, and goes on.
    reader.sync()
    assert reader.root["number"] == 1
    assert "readers are served" in far.log()
