"""How a cluster begins, and that no second one does: row 45."""

import os
import shutil
import time

import pytest
import ZEO.Exceptions

import cluster as harness
from test_cluster import check_histories
from test_promotion import wait_no_primary
from zeo_client import Client, transactions


def wipe(node, data=True):
    """The machine comes back with an empty disk, or without its state-dir."""
    shutil.rmtree(node.state_dir)
    if data:
        os.remove(node.data_file)


def shown(node):
    picture = node.status()
    return next((n for n in picture["nodes"] if n["node"] == node.name), {}) if picture else {}


def serves_nobody(node, seconds=3):
    with pytest.raises(ZEO.Exceptions.ClientDisconnected):
        Client([node.address], wait_timeout=seconds)


@pytest.mark.parametrize("data", [True, False], ids=["an empty disk", "no state-dir"])
def test_row_45_a_first_member_that_comes_up_first_founds_nothing(nodes, data):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1), "kept")
    cluster.wait_level()
    cluster.stop()
    first, others = cluster.nodes[0], cluster.nodes[1:]
    wipe(first, data)
    first.start()
    serves_nobody(first)
    assert "it bootstraps the cluster when a majority of the 3 listed members agrees" in shown(first)["waits"]
    # The others know a cluster: it takes the first one in.
    for node in others:
        node.start()
    client.commit(lambda root: root.update(y=root["x"] + 1), "and this")
    cluster.wait_healthy()
    assert first.log().count("bootstrapped a cluster") == 1
    harness.wait_for("it to belong", lambda: "waits" not in shown(first))
    client.close()
    check_histories(cluster, [b"kept", b"and this"])


def test_row_45_two_of_three_found_a_cluster(nodes):
    cluster = nodes.cluster()
    first, second, third = cluster.nodes
    first.start()
    serves_nobody(first)
    third.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1), "kept")
    # What was promised is kept: nobody else is listed first, and the founder is still the same.
    second.start()
    cluster.wait_healthy()
    client.close()
    check_histories(cluster, [b"kept"])


def test_row_45_members_that_each_list_themselves_first_found_nothing(nodes):
    cluster = nodes.cluster()
    names = [node.name for node in cluster.nodes]
    for node in cluster.nodes:
        order = sorted(cluster.nodes, key=lambda other: other is not node)
        lines = "".join("  member %s 127.0.0.1:%s here\n" % (n.name, n.peer_port) for n in order)
        node.join("test", lines)
        node.start()
    for node in cluster.nodes:
        others = [name for name in names if name != node.name]
        harness.wait_for(
            "a reason", lambda: all("the file of %s names" % n in shown(node).get("waits", "") for n in others)
        )
    serves_nobody(cluster.nodes[0])
    assert not any("bootstrapped a cluster" in node.log() for node in cluster.nodes)
    # The person repairs the files.
    cluster.stop()
    cluster.configure()
    cluster.start()


def test_row_45_the_younger_of_two_clusters_stops_serving(nodes):
    """All who know the cluster are away while a majority of the listed members begins anew."""
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1), "kept")
    client.close()
    cluster.wait_level()
    cluster.stop()
    first, second, third = cluster.nodes
    history = transactions(second.data_file)
    # The time of a founding counts in seconds.
    time.sleep(1.1)
    for node in (first, third):
        wipe(node)
        node.start()
    young = Client([first.address, third.address])
    young.commit(lambda root: root.update(y=2), "young")
    second.start()
    for node in (first, third):
        text = "n2 belongs to a cluster of the same name that was bootstrapped before this one"
        harness.wait_for("to stop", lambda: text in shown(node).get("stopped", ""))
        assert text in node.log()
        assert node.metric("standby_second_cluster") == 1
        serves_nobody(node)
    young.close()
    # It stays so.
    first.stop()
    first.start()
    harness.wait_for("to be there", lambda: "stopped" in shown(first))
    serves_nobody(first)
    # What both have is kept, until a person puts one of the two aside. The one that knows the older cluster is no
    # majority of it: whoever comes empty bootstraps nothing beside it.
    for node in (first, third):
        node.stop()
        assert any(txn[3] == b"young" for txn in transactions(node.data_file))
        wipe(node)
        node.start()
    text = "n2 belongs to the cluster already"
    harness.wait_for("a reason", lambda: text in shown(first).get("waits", ""))
    wait_no_primary(second)
    # By now it has links to both; they end with its timeline, and are made anew.
    time.sleep(2)
    second.ask("recover-quorum", "--yes")
    cluster.wait_healthy()
    cluster.stop()
    for node in cluster.nodes:
        assert transactions(node.data_file)[: len(history)] == history
