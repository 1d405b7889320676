"""Commands that an administrator has a node run when its role changes, to move a virtual address for example."""

import os
import time

import pytest

import cluster as harness
from places import moving
from test_scenario import places  # noqa: F401 (a fixture)
from zeo_client import Client

OPTIONS = (
    "  on-primary echo $$STANDBY_ROLE $$STANDBY_CLUSTER $$STANDBY_TERM $$STANDBY_ADDRESS >> %(log)s/$$STANDBY_NODE\n"
    "  on-replica echo $$STANDBY_ROLE $$STANDBY_CLUSTER $$STANDBY_TERM $$STANDBY_ADDRESS >> %(log)s/$$STANDBY_NODE\n"
)


def said(directory, name):
    """What the commands of a node were told: (role, cluster, term, address) each time."""
    try:
        with open(os.path.join(directory, name)) as file:
            return [tuple(line.split()) for line in file]
    except FileNotFoundError:
        return []


def roles(directory, name):
    return [line[0] for line in said(directory, name)]


def test_each_change_of_role_runs_a_command(nodes, tmp_path):
    cluster = nodes.cluster(options=OPTIONS % {"log": tmp_path}).start()
    cluster.make_primary(cluster.nodes[0])
    harness.wait_for("n1 has said so", lambda: roles(tmp_path, "n1")[-1:] == ["primary"])
    role, name, term, address = said(tmp_path, "n1")[-1]
    assert (name, int(term)) == ("test", cluster.status()["term"])
    assert address == "%s:%s" % cluster.nodes[0].address
    for node in cluster.nodes:
        # It begins as a replica, for it does not know better.
        harness.wait_for("a first command", lambda: roles(tmp_path, node.name)[:1] == ["replica"])
    cluster.nodes[0].ask("switchover", "--to", "n2")
    harness.wait_for("n2 has said so", lambda: roles(tmp_path, "n2")[-1:] == ["primary"])
    harness.wait_for("n1 has said so", lambda: roles(tmp_path, "n1")[-1:] == ["replica"])
    cluster.named("n2").kill()
    before = {name: len(said(tmp_path, name)) for name in ("n1", "n3")}
    third = cluster.primary()
    harness.wait_for("the third has said so", lambda: roles(tmp_path, third.name)[-1:] == ["primary"])
    other = "n1" if third.name == "n3" else "n3"
    assert len(said(tmp_path, other)) == before[other]


def test_a_command_that_fails_or_hangs_stops_nobody(nodes):
    options = "  on-primary echo no such interface >&2; exit 3\n  on-replica exec sleep 3\n"
    cluster = nodes.cluster(options=options).start()
    client = Client(cluster.addresses)
    for number in range(3):
        client.commit(lambda root: root.update(x=number))
        cluster.nodes[0].ask("switchover")
    client.commit(lambda root: root.update(x=3))
    client.close()


def test_a_command_that_fails_is_logged(nodes):
    cluster = nodes.cluster(options="  on-primary echo no such interface >&2; exit 3\n").start()
    node = cluster.primary()
    harness.wait_for("a warning", lambda: "no such interface" in node.log())
    assert "on-primary has failed" in node.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_client_goes_with_a_virtual_address(places, nodes):  # noqa: F811
    """It waits for nobody at a machine that the address has left."""
    world = places("office", "n1", "n2", "n3")
    address = "10.77.0.100"
    # As slow as a script may be.
    options = moving(address, before="sleep 0.3; ")
    cluster = nodes.cluster(places=world, options=options, zeo="  address 8100")

    def test():
        cluster.start()
        client = Client([(address, 8100)], wait_timeout=30)
        for number in range(9):
            node = cluster.nodes[number % 3]
            if cluster.primary() is not node:
                node.ask("switchover", "--to", node.name)
            begun = time.monotonic()
            client.commit(lambda root: root.update(x=number))
            waited = time.monotonic() - begun
            print("%.1f s" % waited)
            # Less than ZEO waits for a connection: it had one, to nobody.
            assert waited < 20
        client.close()

    world.run("office", test)
