"""A frozen node is killed, so that its clients' connections break; what crashes is started again."""

import os
import signal
import socket
import time

import cluster as harness
from zeo_client import Client

SUPERVISED = ["--supervise", "--frozen-after", "1"]


def is_gone(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_row_29_clients_leave_a_frozen_primary(nodes):
    cluster = nodes.cluster(arguments=SUPERVISED).start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    frozen = cluster.primary()
    pid = frozen.child()
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    # A stock client, whose connection nobody closes.
    client.commit(lambda root: root.update(x=1))
    print("a commit %.1f s after SIGSTOP" % (time.monotonic() - stopped))
    assert is_gone(pid)
    harness.wait_for("the reason", lambda: "gave no sign of life" in frozen.log())
    cluster.wait_level()
    assert frozen.child() != pid
    reader = Client(frozen.read_only_address, read_only=True)
    assert reader.root["x"] == 1
    reader.close()
    client.close()


def test_what_ends_and_what_is_started_again(nodes, tmp_path):
    node = nodes.alone(arguments=["--supervise"])
    node.start()
    harness.wait_for("a node", node.listens)
    client = Client(node.address)
    client.commit(lambda root: root.update(x=1))
    first = node.child()
    os.kill(first, signal.SIGKILL)
    client.commit(lambda root: root.update(x=2))
    assert "the node has crashed" in node.log()
    second = node.child()
    # The supervisor passes on what it is told.
    node.signal(signal.SIGHUP)
    client.commit(lambda root: root.update(x=3))
    client.close()
    assert node.child() == second
    assert node.stop() == 0
    assert is_gone(first) and is_gone(second)
    # Errors are for people: the node is not started again and again.
    node.start()
    harness.wait_for("a node", node.listens)
    other = harness.Node(tmp_path / "other", arguments=["--supervise"], data_file=node.data_file)
    assert other.start().wait() == 1
    assert "cannot use" in other.log() and "its log says why" in other.log()
    with open(other.config_path, "a") as config:
        config.write("<standbi>\n</standbi>\n")
    assert other.start().wait() == 1
    assert "standbi" in other.log()
    # A node does not outlive its supervisor.
    pid = node.child()
    node.kill()
    harness.wait_for("the end of the node", lambda: is_gone(pid))


def test_a_frozen_node_that_was_told_to_end(nodes):
    node = nodes.alone(arguments=SUPERVISED)
    node.start()
    harness.wait_for("a node", node.listens)
    pid = node.child()
    os.kill(pid, signal.SIGSTOP)
    node.signal(signal.SIGTERM)
    assert node.wait() == 1
    assert is_gone(pid)
    assert "had to be killed" in node.log()


def test_systemd_is_told(nodes, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        node = nodes.alone().start()
        manager.settimeout(10)
        heard = set()
        while not {"READY=1", "WATCHDOG=1"} <= heard:
            heard.update(manager.recv(4096).decode().split())
        node.signal(signal.SIGSTOP)
        time.sleep(0.5)
        manager.setblocking(False)
        # What came before.
        while True:
            try:
                manager.recv(4096)
            except BlockingIOError:
                break
        manager.settimeout(1.5)
        try:
            raise AssertionError("a frozen node said %r" % manager.recv(4096))
        except TimeoutError:
            pass
        node.signal(signal.SIGCONT)
        assert manager.recv(4096) == b"WATCHDOG=1\n"
        node.stop()
        # Two that watch would be in each other's way.
        node.arguments = ["--supervise"]
        assert node.start().wait() == 1
        assert "leave --supervise out" in node.log()
