"""Nodes that were added, and those that come back empty, find the cluster whoever is primary."""

import json
import os
import shutil

import cluster as harness
from test_cluster import check_files, check_histories
from test_founding import shown
from test_membership import new_node, stopping, wait_for_voters  # noqa: F401  (a fixture)
from test_promotion import lost_files, wait_no_primary
from zeo_client import Client


def empty(node):
    node.kill()
    shutil.rmtree(node.state_dir)
    os.remove(node.data_file)


def remembered(node):
    with open(os.path.join(node.state_dir, "peers")) as file:
        return json.load(file)


def test_a_node_joins_by_a_member_that_is_not_primary_any_more(stopping, tmp_path):
    cluster = stopping().start()
    n1, n2, n3 = cluster.nodes
    cluster.make_primary(n1)
    printed = n1.ask("node", "add", "n4")
    n4 = new_node(cluster, tmp_path, "n4", printed)
    cluster.make_primary(n2)
    n4.start()
    wait_for_voters(cluster, "n1", "n2", "n3", "n4")
    # It has learned where the others are: the one that its file names is not needed any more.
    cluster.make_primary(n3)
    n1.kill()
    n4.stop()
    n4.start()
    harness.wait_for("it to be level", lambda: shown(n4).get("state") == "up")
    n1.start()
    cluster.wait_healthy()
    check_histories(cluster, [])


def test_a_node_that_lost_its_disk_is_taken_in_by_a_primary_that_its_file_does_not_name(stopping, tmp_path):
    cluster = stopping().start()
    n1, n2 = cluster.nodes[:2]
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1), "kept")
    n4 = new_node(cluster, tmp_path, "n4", cluster.primary().ask("node", "add", "n4"))
    n4.start()
    wait_for_voters(cluster, "n1", "n2", "n3", "n4")
    cluster.make_primary(n4)
    for node in (n2, n1):
        empty(node)
        node.start()
        cluster.wait_healthy()
    client.close()
    check_histories(cluster, [b"kept"])


def test_who_waits_and_who_is_refused_is_told_why(stopping, tmp_path):
    cluster = stopping().start()
    primary = cluster.primary()
    printed = primary.ask("node", "add", "n4", "--group", "elsewhere")
    n4 = new_node(cluster, tmp_path, "n4", printed, group="here").start()
    text = "does not let this node in: it is not invited"
    harness.wait_for("a reason", lambda: text in shown(n4).get("waits", ""))
    assert text in n4.log()
    assert "n4 is there, and not let in: it is not invited" in primary.ask("status")
    assert "it is not invited" in n4.ask("status")


def test_another_machine_of_the_same_name_does_not_take_the_place_of_a_member(stopping, tmp_path):
    cluster = stopping().start()
    n1, n2, n3 = cluster.nodes
    cluster.make_primary(n1)
    before = shown(n2)["peer_address"]
    twin = harness.Node(tmp_path / "cluster" / "twin", "n2")
    lines = "".join(
        "  member %s 127.0.0.1:%s here\n" % (node.name, node.peer_port) for node in (n1, twin, n3)
    )
    twin.join("test", lines)
    cluster.nodes.append(twin)
    twin.start()
    harness.wait_for("a reason", lambda: "another machine is node n2" in shown(twin).get("waits", ""))
    # The member restarts: its twin does not take the moment.
    n2.stop()
    harness.wait_for("a reason", lambda: "less than a minute ago" in shown(twin).get("waits", ""))
    n2.start()
    harness.wait_for("it to be there", lambda: cluster.seen(n2, n1)["state"] == "up")
    assert cluster.seen(n2, n1)["peer_address"] == before
    assert "n2 is there, and not let in" in n1.ask("status")


def test_a_promoted_place_whose_nodes_were_added_takes_the_lost_ones_in(stopping, tmp_path):
    """All nodes of the first place come back to one whose node their files do not name."""
    cluster = stopping(groups=["london"] * 3).start()
    london = list(cluster.nodes)
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1), "kept")
    paris = []
    for name in ("n4", "n5", "n6"):
        printed = cluster.primary().ask("node", "add", name, "--group", "paris")
        paris.append(new_node(cluster, tmp_path, name, printed, group="paris").start())
        harness.wait_for("it to follow", lambda: shown(paris[-1]).get("state") == "up")
    client.commit(lambda root: root.update(x=2), "both")
    cluster.wait_level()
    for node in paris:
        node.kill()
    client.commit(lambda root: root.update(x=3), "london only")
    client.close()
    for node in london:
        node.kill()
    for node in paris:
        node.start()
    wait_no_primary(paris[0], london)
    paris[0].ask("promote", "--group", "paris", "--force", "--yes")
    there = Client([node.address for node in paris])
    there.commit(lambda root: root.update(x=4), "paris only")
    printed = paris[0].ask("lost", "list")
    assert "not asked, for they are down: n1, n2, n3" in printed
    for node in london:
        node.start()

    def together():
        picture = paris[0].status()
        up = {n["node"] for n in picture["nodes"] if n["state"] == "up"}
        return up == {node.name for node in cluster.nodes}

    harness.wait_for("all to be together", together, timeout=60)
    there.commit(lambda root: root.update(x=5), "all")
    assert all(len(lost_files(node)) == 1 for node in london)
    printed = paris[0].ask("lost", "list")
    assert all(lost_files(node)[0] in printed for node in london)
    there.close()
    # And home again.
    paris[0].ask("group", "move", "--to", "london")
    harness.wait_for("london", lambda: cluster.primary().group == "london", timeout=60)
    cluster.wait_level()
    check_files(cluster, [b"kept", b"both", b"paris only", b"all"])


def test_a_member_whose_file_lost_a_storage_does_not_start(stopping):
    cluster = stopping().start()
    third = cluster.nodes[2]
    third.stop()
    with open(third.config_path) as file:
        text = file.read()
    with open(third.config_path, "w") as file:
        file.write(text.replace("<filestorage>", "<filestorage other>").replace("Data.fs", "Other.fs"))
    third.start()
    assert third.wait() == 1
    assert 'has no section for storage "1"' in third.log()
    assert not os.path.exists(third.data_file.replace("Data.fs", "Other.fs"))


def test_a_node_that_has_moved_is_reached_where_it_is_now(nodes):
    """Its peer address is another one than it had when it joined."""
    cluster = nodes.cluster().start()
    first, other, moved = cluster.nodes
    cluster.make_primary(first)
    moved.stop()
    former = "127.0.0.1:%s" % moved.peer_port
    moved.peer_port = harness.free_ports(1)[0]
    cluster.configure()
    moved.start()
    cluster.wait_healthy()
    harness.wait_for(
        "the new address",
        lambda: cluster.seen(moved, by=first)["peer_address"] == "127.0.0.1:%s" % moved.peer_port,
    )
    # The membership has it: what nodes remember of it for their next start follows.
    for node in (first, other):
        harness.wait_for("it to be remembered", lambda: former not in remembered(node))
        assert "127.0.0.1:%s" % moved.peer_port in remembered(node)
    wait_for_voters(cluster, "n1", "n2", "n3")
    # Clients are passed on to it, and a node that has lost its data asks it for them.
    cluster.make_primary(moved)
    client = Client([first.address])
    client.commit(lambda root: root.update(x=1))
    client.close()
    empty(first)
    first.start()
    cluster.wait_level()
    check_histories(cluster, [])
