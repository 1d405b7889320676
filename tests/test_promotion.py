"""Forced promotion: a place, or a majority, is lost with commits that nobody else has."""

import glob
import os
import random
import signal
import subprocess
import time

import ZODB.FileStorage
import ZODB.POSException
from persistent.mapping import PersistentMapping

import cluster as harness
import pytest
from places import Places
from test_blobs import blob_client, put, read
from test_cluster import check_files, transactions
from test_membership import wait_for_voters
from zeo_client import Client, make_database


def lost_files(node):
    return sorted(glob.glob(os.path.join(node.directory, "lost-*.fs")))


def take_down(nodes):
    for node in nodes:
        node.kill()


def wait_no_primary(node, lost=()):
    def alone():
        picture = node.status()
        names = {other.name for other in lost}
        return (
            picture
            and picture["primary"] is None
            and all(n["state"] == "down" for n in picture["nodes"] if n["node"] in names)
        )

    harness.wait_for("no primary", alone)


def blobs_in(path):
    """The blobs of a file of lost transactions, in their order, as Python reads them."""
    kept = ZODB.FileStorage.FileStorage(
        path, read_only=True, blob_dir=path.replace(".fs", ".blobs")
    )
    blobs = []
    for txn in kept.iterator():
        for record in txn:
            try:
                with open(kept.loadBlob(record.oid, record.tid), "rb") as blob:
                    blobs.append(blob.read())
            except ZODB.POSException.POSKeyError:
                pass
    kept.close()
    return blobs


def test_rows_7_13_20_21_a_place_is_lost_and_returns(nodes, tmp_path):
    """The first place has commits, with blobs, that never left it."""
    cluster = nodes.cluster(groups=["london"] * 3 + ["paris"] * 2, blobs=True).start()
    london, paris = cluster.nodes[:3], cluster.nodes[3:]
    clients = [
        blob_client(cluster.addresses, tmp_path / name, client=name, var=str(tmp_path))
        for name in ("one", "two")
    ]
    one, two = clients

    def first(root):
        root.update(both=0, changed="in both", london=0)
        put(root, "blob", b"in both")

    one.commit(first, note="both")
    cluster.wait_level()
    take_down(paris)
    for number in (1, 2, 3):
        one.commit(lambda root: root.update(changed="lost", london=number), note="lost %d" % number)
    one.commit(lambda root: put(root, "blob", b"lost"), note="lost 4")
    one.commit(lambda root: put(root, "another", b"lost too"), note="lost 5")
    # Both have it in their caches.
    two.sync()
    assert two.root["london"] == 3 and read(two.root, "blob") == b"lost"
    last = two.db.storage.lastTransaction()
    take_down(london)
    for node in paris:
        node.start()
    wait_no_primary(paris[0])

    # Nothing happens by itself, and not without a word that it is meant.
    time.sleep(3)
    assert paris[0].status()["primary"] is None
    assert "--force" in paris[0].ask("promote", "--group", "paris", fails=True)
    assert "no node of group rome" in paris[0].ask("promote", "--group", "rome", "--force", fails=True)
    assert "--yes" in paris[0].ask("promote", "--group", "paris", "--force", fails=True)
    printed = paris[0].ask("promote", "--group", "paris", "--force", "--yes")
    assert "primary, on timeline 2" in printed and "would be primary" in printed
    wait_for_voters(cluster, "n4", "n5")
    assert cluster.primary() in paris

    # The clients go on, with the truth.
    for client in clients:
        client.sync()
        root = client.root
        assert (root["changed"], root["london"]) == ("in both", 0)
        assert read(root, "blob") == b"in both" and "another" not in root
        assert client.db.storage.lastTransaction() > last
    one.commit(lambda root: root.update(paris=1))
    two.sync()
    assert two.root["paris"] == 1

    # The first place returns. It never serves, keeps what only it had, and follows.
    for node in london:
        node.start()
    cluster.failover = "paris"
    cluster.wait_healthy()
    assert cluster.status()["timeline"] == 2
    expected = [(b"lost %d" % number) for number in (1, 2, 3, 4, 5)]
    whole = 0
    for node in london:
        assert "this node is primary" not in node.log().split("rejoins")[-1]
        (path,) = lost_files(node)
        notes = [txn[3] for txn in transactions(path)]
        # What was acknowledged was on two of them.
        assert notes == expected[: len(notes)]
        shown = cluster.seen(node)["lost"]
        assert [tail["transactions"] for tail in shown] == [len(notes)]
        if notes == expected:
            whole += 1
            assert blobs_in(path) == [b"lost", b"lost too"]
    assert whole >= 2
    printed = paris[0].ask("lost", "list")
    assert all(node.name in printed for node in london) and "lost-1-" in printed
    assert "keeps 5 lost" in paris[0].ask("status")
    assert "timeline 2" in paris[0].ask("lineage", "show")

    # It gets the primary back when somebody says so.
    paris[0].ask("group", "move", "--to", "london")
    wait_for_voters(cluster, "n1", "n2", "n3")
    one.commit(lambda root: root.update(london=4))
    two.sync()
    assert (two.root["london"], two.root["paris"], read(two.root, "blob")) == (4, 1, b"in both")
    for client in clients:
        client.close()
    cluster.failover = "london"
    cluster.wait_level()
    check_files(cluster, [])
    out = tmp_path / "exported"
    subprocess.run([harness.STANDBY, "lost", "export", lost_files(london[0])[0], "--to", out], check=True)
    assert (out / "transactions.json").exists()
    assert [txn[3] for txn in transactions(glob.glob(str(out / "*.fs"))[0])][0] == b"lost 1"


def test_row_15_a_majority_is_lost_for_good(nodes):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.wait_level()
    survivor = next(node for node in cluster.nodes if node is not cluster.primary())
    refused = survivor.ask("recover-quorum", "--yes", fails=True)
    assert "is primary" in refused
    others = [node for node in cluster.nodes if node is not survivor]
    take_down(others)
    wait_no_primary(survivor)
    reader = Client([survivor.read_only_address], read_only=True)
    assert reader.root["number"] == 1
    assert "primary, on timeline 2" in survivor.ask("recover-quorum", "--yes")
    # A stock client goes on, and so does one that was reading.
    client.commit(lambda root: root.update(number=2))
    harness.wait_for("the reader", lambda: reader.sync() or reader.root["number"] == 2)
    # One of the lost comes back after all, and votes again.
    others[0].start()
    wait_for_voters(cluster, survivor.name, others[0].name)
    client.commit(lambda root: root.update(number=3))
    survivor.kill()
    survivor.start()
    client.commit(lambda root: root.update(number=4))
    others[1].start()
    cluster.wait_healthy()
    client.close()
    reader.close()
    cluster.wait_level()
    check_files(cluster, [])


def test_row_14_two_promotions_are_told_of_and_decided(nodes, tmp_path):
    cluster = nodes.cluster(groups=["london", "paris", "rome"]).start()
    n1, n2, n3 = cluster.nodes
    client = Client(n1.address)
    client.commit(lambda root: root.update(by="all"), note="all")
    cluster.wait_level()
    client.close()
    # Neither of the two can reach the other, nor the first.
    take_down([n1, n3])
    wait_no_primary(n2)
    n2.ask("promote", "--group", "paris", "--force", "--yes")
    client = Client(n2.address)
    client.commit(lambda root: root.update(by="paris"), note="paris")
    client.close()
    take_down([n2])
    n3.start()
    wait_no_primary(n3)
    n3.ask("promote", "--group", "rome", "--force", "--yes")
    client = Client(n3.address)
    client.commit(lambda root: root.update(by="rome"), note="rome")
    client.close()

    # They meet: neither joins the other, each says so, both go on.
    n2.start()

    def told():
        pictures = [n2.status(), n3.status()]
        return all(picture and picture.get("diverged") for picture in pictures)

    harness.wait_for("the nodes to meet", told)
    assert "n3 has gone on by itself" in n2.ask("status")
    shown = n2.ask("lineage", "show")
    assert "begun by n2" in shown and "begun by n3" in shown
    assert n2.status()["primary"] == "n2" and n3.status()["primary"] == "n3"
    # One that was left behind by both does not choose.
    n1.start()
    assert n1.wait() != 0
    assert "two forced promotions while this node was away" in n1.log()
    assert "standby lineage accept" in n1.log()

    # Somebody decides.
    (name,) = [fork["id"] for fork in n3.status()["forks"]]
    for node in (n1, n2):
        node.stop()
        command = [harness.STANDBY, "lineage", "accept", name, "-C", node.config_path]
        subprocess.run(command, check=True)
        node.start()
    cluster.failover = "rome"
    cluster.wait_healthy()
    client = Client(cluster.addresses)
    assert client.root["by"] == "rome"
    client.commit(lambda root: root.update(by="rome again"))
    client.close()
    (path,) = lost_files(n2)
    assert b"paris" in [txn[3] for txn in transactions(path)]
    assert not lost_files(n1)
    cluster.wait_level()
    check_files(cluster, [])


def test_a_file_that_was_packed_after_the_fork_is_put_aside(nodes):
    """What a pack has removed in the light of lost transactions cannot be brought back by a cut."""
    cluster = nodes.cluster(groups=["london", "paris"]).start()
    n1, n2 = cluster.nodes
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(gone="soon", kept="always"), note="both")
    cluster.wait_level()
    n2.kill()
    client.commit(lambda root: root.pop("gone"), note="lost")
    client.db.pack()
    n1.kill()
    n2.start()
    wait_no_primary(n2)
    n2.ask("promote", "--group", "paris", "--force", "--yes")
    client.sync()
    assert client.root["gone"] == "soon"
    n1.start()
    cluster.failover = "paris"
    cluster.wait_healthy()
    assert "is put aside" in n1.log()
    assert os.path.exists(n1.data_file + ".before-timeline-2")
    client.close()
    cluster.wait_level()
    check_files(cluster, [])


def test_a_witness_comes_over_too(nodes):
    cluster = nodes.cluster(groups=["london", "london", "witness", "paris"]).start()
    witness, n4 = cluster.nodes[2:]
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.wait_level()
    take_down(cluster.nodes[:3])
    wait_no_primary(n4)
    n4.ask("promote", "--group", "paris", "--force", "--yes")
    client.commit(lambda root: root.update(number=2))
    for node in cluster.nodes[:3]:
        node.start()
    cluster.failover = "paris"
    cluster.wait_healthy()
    assert "rejoins" in witness.log()
    client.close()




@pytest.mark.parametrize("supervised", [False, True])
def test_row_29_a_frozen_primary_wakes_up_on_a_timeline_that_is_over(nodes, supervised):
    """It begins its process anew, whose id stays the same."""
    arguments = ["--supervise", "--frozen-after", "60"] if supervised else []
    cluster = nodes.cluster(groups=["london", "paris"], arguments=arguments).start()
    n1, n2 = cluster.nodes
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(number=1))
    cluster.wait_level()
    pid = n1.child() if supervised else n1.process.pid
    os.kill(pid, signal.SIGSTOP)
    wait_no_primary(n2, [n1])
    n2.ask("promote", "--group", "paris", "--force", "--yes")
    os.kill(pid, signal.SIGCONT)
    # A voter alone is sure of itself: what it commits before it hears of the other one would be lost.
    harness.wait_for("n1 to hear of it", lambda: "it begins anew" in n1.log())
    client.commit(lambda root: root.update(number=2))
    cluster.failover = "paris"
    cluster.wait_healthy()
    assert not lost_files(n1)
    assert (n1.child() if supervised else n1.process.pid) == pid
    assert n1.process.poll() is None
    client.close()
    cluster.wait_level()
    check_files(cluster, [])


def test_promotions_and_returns_are_killed_at_random_moments(nodes):
    """Whatever step of it a power cord ends, it can be done again, and nothing else is lost."""
    cluster = nodes.cluster(groups=["london", "paris"], blobs=True).start()
    n1, n2 = cluster.nodes
    client = Client(cluster.addresses)
    notes = []
    seed = int(time.time())
    print("seed", seed)
    chance = random.Random(seed)

    def commit(note):
        client.commit(lambda root: root.update(note=note), note=note)

    for number in range(5):
        commit("kept %d" % number)
        notes.append(b"kept %d" % number)
        cluster.wait_level()
        n2.kill()
        commit("lost %d" % number)
        n1.kill()
        n2.start()
        wait_no_primary(n2)
        promote = ("promote", "--group", "paris", "--force", "--yes")
        command = [harness.STANDBY, *promote, "--at", "127.0.0.1:%s" % n2.admin_port]
        promoting = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.random() * 0.05)
        n2.kill()
        promoting.wait(30)
        n2.start()
        harness.wait_for("n2", lambda: n2.status())
        if n2.status()["timeline"] == 1 + number:
            harness.wait_for("n2 without a primary", lambda: not n2.status()["primary"])
            # Until it has taken the last changes of members from its log, it may think that it is a majority.
            again = lambda: subprocess.run(command, capture_output=True).returncode == 0
            harness.wait_for("the promotion", again)
        commit("new %d" % number)
        notes.append(b"new %d" % number)
        for _ in range(2):
            n1.start()
            time.sleep(chance.random() * 0.25)
            n1.kill()
        n1.start()
        cluster.failover = "paris"
        cluster.wait_healthy()
        assert n1.status()["timeline"] == 2 + number
        assert len(lost_files(n1)) == number + 1
        lost = [txn[3] for txn in transactions(lost_files(n1)[-1])]
        assert lost == [b"lost %d" % number]
        # On a busy machine the primary may not have heard of it for a moment.
        move = [harness.STANDBY, "group", "move", "--to", "london"]
        move += ["--at", "127.0.0.1:%s" % n1.admin_port]
        moved = lambda: subprocess.run(move, capture_output=True).returncode == 0
        harness.wait_for("the move", moved)
        cluster.failover = "london"
        cluster.wait_healthy()
    client.close()
    cluster.wait_level()
    history = check_files(cluster, notes)
    assert not any(txn[3].startswith(b"lost") for txn in history)


def everything(client):
    """Every object of the database as a client sees it."""
    client.sync()
    root = client.root
    found = {number: dict(mapping) for number, mapping in root["tree"].items()}
    found["blob"] = read(root, "blob")
    found["paris"] = root.get("paris")
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_rows_7_13_20_21_a_place_is_lost_by_the_network(nodes, tmp_path, how):
    """Stock clients in a third place, with warm and persistent caches, go on in the second place. The first one
    returns from the dead or, having committed on all the time, from being cut off; and gets the primary back."""
    world = Places(["office", "london", "paris"], {"paris": 2})
    try:
        cluster = nodes.cluster(groups=["london"] * 3 + ["paris"] * 2, places=world, blobs=True)
        make_database(cluster.nodes[0].data_file, 400)
        world.run("office", lambda: lose_a_place(world, cluster, tmp_path, how))
    finally:
        world.close()


def lose_a_place(world, cluster, tmp_path, how):
    cluster.start()
    london, n4 = cluster.nodes[:3], cluster.nodes[3]

    def connect(name):
        return blob_client(cluster.addresses, tmp_path / name, client=name, var=str(tmp_path))

    one, two = connect("one"), connect("two")
    one.commit(lambda root: put(root, "blob", b"in both"), note="both")
    for client in (one, two):
        truth = everything(client)
    cluster.wait_level()

    # From here on, nothing that is committed reaches the second place.
    world.cut("paris")
    lost = []

    def change(client, number):
        def changes(root):
            root["tree"][number]["number"] = "lost"
            root["tree"][10000 + number] = PersistentMapping(lost=number)

        client.commit(changes, note="lost %d" % number)
        lost.append(b"lost %d" % number)

    for number in range(20):
        change(one, number)
    one.commit(lambda root: put(root, "blob", b"lost"), note="lost blob")
    lost.append(b"lost blob")
    for client in (one, two):
        seen = everything(client)
        assert seen != truth and seen["blob"] == b"lost"
    if how == "killed":
        take_down(london)
        world.cut("london")
    else:
        # Who waits for a server that says nothing waits for ever: these are started again, with their caches.
        for client in (one, two):
            client.close()
        world.cut("london")

        def go_on():
            local = connect("local")
            for number in range(100, 105):
                change(local, number)
            local.close()

    world.heal("paris")
    wait_no_primary(n4, london)
    n4.ask("promote", "--group", "paris", "--force", "--yes")
    if how == "cut off":
        one, two = connect("one"), connect("two")
    for client in (one, two):
        assert everything(client) == truth
    one.commit(lambda root: root.update(paris=1), note="paris")
    truth["paris"] = 1
    wait_for_voters(cluster, "n4", "n5")
    if how == "cut off":
        # The first place has not been told: its own clients go on there, with later tids.
        time.sleep(10)
        world.run("london", go_on)

    world.heal("london")
    if how == "killed":
        for node in london:
            node.start()
    cluster.failover = "paris"
    cluster.wait_healthy()
    whole = 0
    for node in london:
        (path,) = lost_files(node)
        notes = [txn[3] for txn in transactions(path)]
        assert notes == lost[: len(notes)]
        if notes == lost:
            whole += 1
            assert blobs_in(path) == [b"lost"]
    assert whole >= 2
    if how == "cut off":
        # It has seen later tids than the second place had given out.
        local = connect("local")
        assert everything(local) == truth
        local.close()
    for client in (one, two):
        assert everything(client) == truth

    n4.ask("group", "move", "--to", "london")
    wait_for_voters(cluster, "n1", "n2", "n3")
    two.commit(lambda root: root.update(paris=2))
    truth["paris"] = 2
    for client in (one, two):
        assert everything(client) == truth
        client.close()
    cluster.failover = "london"
    cluster.wait_level()
    check_files(cluster, [])
