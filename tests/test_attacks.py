"""What clients at the ports may do, and what the others see of it."""

import contextlib
import http.server
import itertools
import os
import pickle
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
import transaction
import ZODB
import ZODB.FileStorage
from ZODB.blob import Blob
from ZODB.POSException import ReadOnlyError

import cluster as harness
from large import commit_many, stores
from persistent import Persistent
from test_alone import call, exactly, receive, registered, send
from zeo_client import Client, Voted


class Heavy(Persistent):
    """An object with some bytes."""

    def __init__(self, content):
        self.content = content


# Sessions and terms must last while the machine is busy with other tests: what ends them here is an attack.
PATIENT = "  profile wan\n"


def latencies(client, seconds):
    """How long each commit took, in order of length."""
    taken = []
    for number in itertools.count():
        if sum(taken) > seconds:
            return sorted(taken)
        started = time.monotonic()
        client.commit(lambda root: root.update(x=number))
        taken.append(time.monotonic() - started)


def p99(taken):
    return taken[len(taken) * 99 // 100]


def resident(node):
    """Bytes of memory of a node."""
    with open("/proc/%d/statm" % node.process.pid) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pings_at_a_replica_leave_the_primary_alone(nodes):
    """Each asks the primary how far a read must see; it asks the others whether it leads."""
    cluster = nodes.cluster(options=PATIENT).start()
    primary = cluster.primary()
    replica = next(node for node in cluster.nodes if node is not primary)
    client = Client(cluster.addresses)
    term = cluster.status()["term"]
    before = latencies(client, 2)
    memory = resident(replica)
    stopping = threading.Event()
    received = [0] * 5
    socks = [registered(replica.read_only_address) for _ in received]
    frame = call(2, "ping")
    frames = (len(frame).to_bytes(4, "big") + frame) * 10000

    def send_all(sock):
        with contextlib.suppress(OSError):
            while not stopping.is_set():
                sock.sendall(frames)

    def take(number):
        with contextlib.suppress(OSError):
            while length := len(socks[number].recv(1 << 20)):
                received[number] += length

    floods = [threading.Thread(target=send_all, args=(sock,), daemon=True) for sock in socks]
    floods += [threading.Thread(target=take, args=(n,), daemon=True) for n in range(len(socks))]
    for thread in floods:
        thread.start()
    during = latencies(client, 8)
    grown = resident(replica) - memory
    stopping.set()
    for sock in socks:
        sock.shutdown(socket.SHUT_RDWR)
    for thread in floods:
        thread.join(30)
    for sock in socks:
        sock.close()
    print(
        "p99 of commits: %.1f ms before, %.1f ms during; %d bytes of replies to pings; %d MB more memory"
        % (1000 * p99(before), 1000 * p99(during), sum(received), grown >> 20)
    )
    assert min(received) > 0
    assert cluster.status()["term"] == term and cluster.primary() is primary
    assert during[-1] < 5 and grown < 200 << 20
    client.close()


def test_who_may_only_read_does_not_pack(nodes):
    cluster = nodes.cluster().start()
    client = Client(cluster.addresses)
    for number in range(3):
        client.commit(lambda root: root.update(x=number))
    cluster.wait_level()
    sizes = [os.path.getsize(node.data_file) for node in cluster.nodes]
    for node in cluster.nodes:
        reader = Client([node.read_only_address], read_only=True)
        with pytest.raises(ReadOnlyError):
            reader.db.storage.pack(time.time() + 1)
        reader.close()
    assert [os.path.getsize(node.data_file) for node in cluster.nodes] == sizes
    client.db.storage.pack(time.time() + 1)
    client.close()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_only_files_become_blobs(nodes, tmp_path, kind):
    """In a shared directory the client names the file. What is none would be somebody else's, or be read for ever."""
    node = nodes.alone(blobs=True)
    node.start()
    client = Client([node.address], blob_dir=node.blob_dir, shared_blob_dir=True)
    client.commit(lambda root: root.update(blob=Blob(b"first")))
    secret = tmp_path / "secret"
    secret.write_text("what the server may read and the client may not")
    storage, oid = client.db.storage, client.root["blob"]._p_oid
    data, serial = storage.load(oid)
    crafted = os.path.join(storage.fshelper.getPathForOID(oid), "crafted.tmp-")
    make = {"link": lambda name: os.symlink(secret, name), "fifo": os.mkfifo, "directory": os.mkdir}
    make[kind](crafted)
    txn = transaction.TransactionManager().begin()
    storage.tpc_begin(txn)
    storage._async("storeBlobShared", oid, serial, data, "crafted.tmp-", id(txn))
    with pytest.raises(Exception, match="crafted.tmp-: cannot take"):
        storage.tpc_vote(txn)
    storage.tpc_abort(txn)
    assert secret.read_text().startswith("what")
    # The server goes on.
    client.commit(lambda root: root.update(other=Blob(b"second")))
    assert client.root["blob"].open().read() == b"first"
    client.close()


def test_what_the_node_keeps_is_for_nobody_else(nodes, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("as good as any secret of 32 bytes")
    secret.chmod(0o644)
    cluster = nodes.cluster(options="  secret-file %s\n" % secret).start()
    node = cluster.nodes[0]
    assert stat.S_IMODE(os.stat(node.state_dir).st_mode) == 0o700
    exposed = "every user of this machine can read "
    assert exposed + str(secret) in node.log()
    node.stop()
    secret.chmod(0o600)
    before = node.log().count(exposed)
    node.start()
    cluster.wait_healthy()
    assert node.log().count(exposed) == before
    node.stop()
    os.chmod(node.state_dir, 0o755)
    node.start()
    cluster.wait_healthy()
    assert exposed + node.state_dir in node.log()


def test_strangers_write_no_lines_into_the_log(nodes):
    """What a stranger sends is told on one line, without what a terminal would obey."""
    cluster = nodes.cluster().start()
    node = cluster.nodes[0]
    evil = b"\x1b[2J\r\n2026-11-29T00:00:00Z ERROR all is lost\n"
    for port in (node.port, node.read_only_port, node.peer_port, node.admin_port):
        for prefix in (b"", (len(evil) & 0xFFFFFFFF).to_bytes(4, "big")):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
                stranger.settimeout(5)
                with contextlib.suppress(OSError):
                    stranger.recv(100) if port in (node.port, node.read_only_port) else None
                    stranger.sendall(prefix + evil)
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(100):
                        pass
    sock = registered(node.read_only_address)
    with contextlib.suppress(OSError):
        send(sock, call(2, "no such \x1b[2J\nERROR all is lost"))
        receive(sock)
    sock.close()
    log = node.log()
    assert "\x1b" not in log
    assert not any(line.startswith(("2026-11-29T00:00:00Z ERROR all", "ERROR all")) for line in log.splitlines())
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1))
    client.close()


def test_strangers_fill_no_log(nodes):
    node = nodes.alone()
    node.start()
    Client(node.address).close()
    lines = node.log().count("\n")
    begun = time.monotonic()
    for number in range(500):
        with contextlib.suppress(OSError), socket.create_connection(node.address, timeout=10) as stranger:
            send(stranger, b"Z4 %d" % number)
            while stranger.recv(100):
                pass
    took = time.monotonic() - begun
    more = node.log().count("\n") - lines
    print("500 strangers in %.1f s wrote %d lines" % (took, more))
    assert 0 < more < 10 + 6 * took and more < 250


def test_a_vote_that_is_held_is_told(nodes):
    """A client has voted and does nothing more; another one waits for the object."""
    cluster = nodes.cluster(options=PATIENT).start()
    client = Client(cluster.addresses, client_label="the one that waits")
    client.commit(lambda root: root.update(x=1))
    holder = Voted(cluster.addresses, client.root._p_oid)
    committing = threading.Thread(target=client.commit, args=(lambda root: root.update(x=2),))
    committing.start()
    primary = cluster.primary()
    harness.wait_for("a line in the log", lambda: "the vote of client " in primary.log())
    (line,) = (line for line in primary.log().splitlines() if "the vote of client " in line)
    assert "(the one that waits) has waited" in line and "for object 0000000000000000 of storage 1" in line, line
    harness.wait_for("the status", lambda: "the vote of client" in (cluster.seen(primary).get("held_vote") or ""))
    # In its table the text is folded.
    assert "waited" in cluster.nodes[0].ask("status")
    holder.storage.close()
    committing.join(60)
    assert not committing.is_alive()
    harness.wait_for("the end of it", lambda: "held_vote" not in cluster.seen(primary))
    client.close()


@pytest.mark.parametrize("count", [1, 3])
def test_invalidations_are_asked_for_without_holding_anybody_up(nodes, count):
    """A few bytes ask for hundreds of thousands of objects, again and again."""
    cluster = nodes.cluster(count=count, options=PATIENT).start()
    node = cluster.primary()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    since = client.db.storage.lastTransaction()
    commit_many(node.address, range(1 << 32, (1 << 32) + 200_000))
    before, memory = latencies(client, 2), resident(node)
    sock = registered(node.address)
    sock.settimeout(60)
    asks = [call(number, "getInvalidations", since) for number in range(2, 402)]
    sock.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in asks))
    taken, grown = [], 0
    # Now and then an answer is taken.
    for number in range(2, 12):
        while (message := pickle.loads(receive(sock)))[0] != number:
            pass
        tid, oids = message[3]
        assert tid > since and len(oids) > 200_000
        taken += latencies(client, 0.5)
        grown = max(grown, resident(node) - memory)
    print(
        "%d bytes sent: %d MB more memory; p99 of another client's commits %.1f ms before, %.1f ms during"
        % (sum(map(len, asks)), grown >> 20, 1000 * p99(before), 1000 * p99(sorted(taken)))
    )
    assert grown < 300 << 20 and p99(sorted(taken)) < 1 + 5 * p99(before)
    sock.close()
    client.close()


@pytest.mark.parametrize("count", [1, 3])
def test_undo_logs_are_looked_for_one_at_a_time(nodes, monkeypatch, count):
    """A few bytes ask for much: for each connection there is one thread, and room for some answers."""
    cluster = nodes.cluster(count=count, options=PATIENT)
    node = cluster.nodes[0]
    monkeypatch.setattr(sys.modules["ZODB.FileStorage.FileStorage"], "fsync", lambda _: None)
    storage = ZODB.FileStorage.FileStorage(node.data_file)
    db = ZODB.DB(storage)
    for number in range(10000):
        with db.transaction(note="x" * 100) as connection:
            connection.root()["x"] = number
    db.close()
    cluster.start()
    cluster.make_primary(node)
    client = Client(cluster.addresses)
    threads = lambda: len(os.listdir("/proc/%d/task" % node.process.pid))
    before, memory = threads(), resident(node)
    sock = registered(node.address)
    asks = b"".join(
        len(frame).to_bytes(4, "big") + frame for frame in (call(number, "undoLog", 0, 1 << 30) for number in range(2, 402))
    )
    sock.sendall(asks)
    most, grown = 0, 0
    for _ in range(50):
        most, grown = max(most, threads()), max(grown, resident(node) - memory)
        time.sleep(0.1)
    latency = p99(latencies(client, 2))
    print(
        "%d bytes sent: %d more threads, %d MB more memory; p99 of another client's commits %.1f ms"
        % (len(asks), most - before, grown >> 20, 1000 * latency)
    )
    assert most - before < 20 and grown < 200 << 20 and latency < 1
    assert pickle.loads(receive(sock))[2] == ".reply"
    sock.close()
    # All that was asked for is forgotten.
    ticks = lambda: sum(map(int, open("/proc/%d/stat" % node.process.pid).read().rsplit(")", 1)[1].split()[11:13]))
    time.sleep(1)
    begun = ticks()
    time.sleep(2)
    assert (ticks() - begun) / os.sysconf("SC_CLK_TCK") < 0.5
    assert len(client.db.undoLog(0, 5)) == 5
    client.close()


@pytest.mark.parametrize("way", ["messages in part", "replies that nobody takes", "transactions"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_sessions_together_hold_so_much(nodes, way, count):
    """Many connections, each within its own limits: those that hold most end, the others do not notice."""
    most = 64 << 20
    cluster = nodes.cluster(count=count, options=PATIENT + "  client-memory 64MB\n").start()
    node = cluster.primary()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0, text="x" * 1_000_000))
    oid, size = client.root._p_oid, 1_000_000
    before, memory = latencies(client, 2), resident(node)
    shown = 0
    socks = [registered(node.address, read_only=False) for _ in range(12)]
    for number, sock in enumerate(socks):
        sock.settimeout(60)
        # What the system takes for them is not the node's.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        with contextlib.suppress(OSError):
            if way == "messages in part":
                sock.sendall((200 << 20).to_bytes(4, "big") + bytes(15 << 20))
            elif way == "transactions":
                send(sock, pickle.dumps((0, True, "tpc_begin", (7, b"", b"", {}, None, " ")), 3))
                for piece in stores(range((number + 1) << 32, ((number + 1) << 32) + 70_000)):
                    sock.sendall(piece)
            else:
                frame = call(2, "loadBefore", oid, b"\x7f" + b"\xff" * 7)
                for _ in range(15 * (1 << 20) // size):
                    send(sock, frame)
        shown = max(shown, cluster.seen(node)["client_memory"][0])
    during = latencies(client, 2)
    # A busy node has not made the replies yet, and a patient one reports only now and then.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shown = max(shown, cluster.seen(node)["client_memory"][0])
        if shown > 8 << 20:
            break
        time.sleep(0.1)
    grown = resident(node) - memory
    ended = node.log().count("its session ends")
    limit = cluster.seen(node)["client_memory"][1]
    print(
        "%s: %d sessions ended; %d MB more memory; p99 of another client's commits %.1f ms before, %.1f ms during"
        % (way, ended, grown >> 20, 1000 * p99(before), 1000 * p99(during))
    )
    assert limit == most and 8 << 20 < shown < 2 * most
    assert ended or way == "replies that nobody takes"
    assert grown < 4 * most and p99(during) < 1 + 5 * p99(before)
    assert node.log().count("closed a client's connection") == ended, "nobody else"
    for sock in socks:
        sock.close()
    harness.wait_for(
        "the memory", lambda: cluster.seen(node)["client_memory"][0] < 1 << 20
    )
    client.commit(lambda root: root.update(x=1))
    client.close()


def test_what_a_node_says_does_nothing_to_a_terminal():
    """A node, a client that has named itself, or who pretends to be a node: what comes from there is read, not obeyed."""
    evil = "n1\x1b]0;owned\x07\x9b2J\u202e"
    answers = {"node": evil, "long": " " * (20 << 20)}

    class Node(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = ("no\nbecause of " + answers[self.server.kind]).encode()
            self.send_response(409)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Node) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        command = [harness.STANDBY, "switchover", "--to", "n2", "--at", "127.0.0.1:%d" % server.server_port]
        said = {}
        for server.kind in answers:
            done = subprocess.run(command, capture_output=True, timeout=60)
            assert done.returncode
            said[server.kind] = (done.stdout + done.stderr).decode()
        server.shutdown()
    thread.join()
    assert "no\nbecause of n1\\u{1b}]0;owned\\u{7}\\u{9b}2J\\u{202e}" in said["node"], said["node"]
    assert len(said["long"]) < 1000 and "its answer: length limit exceeded" in said["long"], said["long"][:1000]


def test_one_address_does_not_take_the_places_of_others(nodes):
    """Of clients from the address that has most connections, those who came last go; nobody else is refused."""
    node = nodes.alone()
    node.within = ["prlimit", "--nofile=200:200"]
    node.start()
    client = Client(node.address)
    client.commit(lambda root: root.update(x=0))
    host, port = node.address
    crowd = []
    for number in range(200):
        sock = socket.create_connection((host, port), 10, source_address=("127.0.0.2", 0))
        crowd.append(sock)
    harness.wait_for("a refusal", lambda: "too many connections of clients" in node.log())
    # From other addresses: more than there were places.
    others = [socket.create_connection((host, port), 10, source_address=("127.0.0.%d" % n, 0)) for n in range(3, 23)]
    for sock in others:
        sock.settimeout(10)
        assert exactly(sock, 4), "it is greeted"
    reader = Client(node.address)
    assert reader.root["x"] == 0
    client.commit(lambda root: root.update(x=1))
    assert "client=127.0.0.2" in node.log() and "another client needs its place" in node.log()
    assert node.log().count("another client needs its place") <= len(others) + 5
    for sock in crowd + others:
        sock.close()
    reader.close()
    client.close()


@pytest.mark.parametrize("waits", ["replies", "a blob", "a look back", "answers beside the applier"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_goes_while_it_is_waited_for_leaves_nothing(nodes, tmp_path, waits, count):
    """Whatever its connection waits for: its session ends, its locks are free, and nothing of it stays open."""
    cluster = nodes.cluster(count=count, blobs=True, options=PATIENT).start()
    primary = cluster.primary()
    client = Client(cluster.addresses, blob_dir=str(tmp_path / "cache"))
    client.commit(lambda root: root.update(locked=Heavy("x"), long=Heavy("x" * 4_000_000), blob=Blob(bytes(80_000_000))))
    for number in range(20):
        client.commit(lambda root: root.update(x=number))
    oids = {name: client.root[name]._p_oid for name in ("locked", "long", "blob")}
    serials = {}
    for name in oids:
        client.root[name]._p_activate()
        serials[name] = client.root[name]._p_serial
    sessions = lambda: primary.metric("standby_sessions")
    files = lambda: len(os.listdir("/proc/%d/fd" % primary.process.pid))
    before = (sessions(), files())
    sock = registered(primary.address, read_only=False)
    send(sock, pickle.dumps((0, True, "tpc_begin", (7, b"", b"", {}, None, " ")), 3))
    record = pickle.dumps(Heavy, 2) + b"N."
    send(sock, pickle.dumps((0, True, "storea", (oids["locked"], serials["locked"], record, 7)), 3))
    send(sock, call(2, "vote", 7))
    while pickle.loads(receive(sock))[0] != 2:
        pass
    asks = {
        "replies": ("loadBefore", oids["long"], b"\x7f" + b"\xff" * 7),
        "a blob": ("sendBlob", oids["blob"], serials["blob"]),
        "a look back": ("undoLog", 0, 1 << 30),
        "answers beside the applier": ("getInvalidations", serials["locked"]),
    }
    for number in range(3, 23):
        send(sock, call(number, *asks[waits]))
    # Some of it has been asked for, and nobody takes it.
    time.sleep(1)
    assert (sessions(), primary.metric("standby_transactions_active")) == (before[0] + 1, 1)
    sock.close()
    began = time.monotonic()
    client.commit(lambda root: setattr(root["locked"], "content", "y"))
    print("the lock was free after %.1f s" % (time.monotonic() - began))
    harness.wait_for("the end of the session", lambda: (sessions(), files()) <= before, 20)
    client.close()


def test_five_hundred_clients_of_one_address_are_served(nodes):
    """With 1024 descriptors and no other limits than those by default: nobody is refused, and nobody's session ends."""
    cluster = nodes.cluster(count=1)
    (node,) = cluster.nodes
    node.within = ["prlimit", "--nofile=1024:1024"]
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0, long="x" * 200_000))
    frame = call(2, "loadBefore", client.root._p_oid, b"\x7f" + b"\xff" * 7)
    socks = [registered(node.address) for _ in range(500)]
    for sock in socks:
        for _ in range(4):
            send(sock, frame)
    held = [node.metric("standby_client_memory" + which) for which in ("_bytes", "_limit_bytes")]
    for sock in socks:
        for _ in range(4):
            assert len(receive(sock)) > 200_000
    print("500 clients, 400 MB asked for: %d MB held at a time, of %d MB" % tuple(one / 2**20 for one in held))
    client.commit(lambda root: root.update(x=1))
    assert "too many connections" not in node.log() and "closed a client's connection" not in node.log()
    for sock in socks:
        sock.close()
    client.close()


def test_row_38_five_hundred_clients_come_to_another_primary_at_once(nodes):
    """All of them verify their caches there; none is refused, and those who commit do not wait for them."""
    cluster = nodes.cluster()
    for node in cluster.nodes:
        node.within = ["prlimit", "--nofile=2048:2048"]
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))
    since = client.db.storage.lastTransaction()
    for number in range(50):
        client.commit(lambda root: root.update(x=number))
    first = cluster.primary()
    socks = [registered(first.address, read_only=False) for _ in range(500)]
    first.kill()
    for sock in socks:
        sock.close()
    second = cluster.primary()
    assert second is not first
    began = time.monotonic()
    socks = []
    for _ in range(500):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(second.address)
        socks.append(sock)
    for sock in socks:
        sock.settimeout(60)
        assert receive(sock)
        send(sock, b"Z5")
        send(sock, call(1, "register", "1", False))
    for sock in socks:
        assert pickle.loads(receive(sock))[:2] == (1, 0)
        send(sock, call(2, "getInvalidations", since))
    taken = latencies(client, 1)
    for sock in socks:
        while (message := pickle.loads(receive(sock)))[0] != 2:
            pass
        assert message[3][0] >= since and len(message[3][1]) >= 1
    print(
        "500 clients have come after %.1f s; p99 of another client's commits meanwhile %.1f ms"
        % (time.monotonic() - began, 1000 * p99(taken))
    )
    assert "too many connections" not in second.log()
    assert second.metric("standby_sessions") >= 500
    for sock in socks:
        sock.close()
    client.close()


def test_what_nobody_takes_does_not_fill_the_system(nodes):
    """The kernel has one store for all connections of the machine: without it no node reaches another one."""
    cluster = nodes.cluster(options=PATIENT).start()
    primary = cluster.primary()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0, long="x" * 1_000_000))
    before, used = latencies(client, 1), pages_of_sockets()
    frame = call(2, "loadBefore", client.root._p_oid, b"\x7f" + b"\xff" * 7)
    socks = [registered(primary.address) for _ in range(200)]
    for sock in socks:
        for _ in range(12):
            send(sock, frame)
    time.sleep(1)
    each = (pages_of_sockets() - used) * os.sysconf("SC_PAGE_SIZE") / len(socks)
    during = latencies(client, 2)
    print(
        "%d KB of the system's memory for each; p99 of another client's commits %.1f ms before, %.1f ms during"
        % (each / 1024, 1000 * p99(before), 1000 * p99(during))
    )
    assert each < 1.5 * 2**20
    for sock in socks:
        sock.close()
    client.close()


def pages_of_sockets():
    """What the kernel holds for TCP connections of the machine."""
    with open("/proc/net/sockstat") as file:
        words = next(line for line in file if line.startswith("TCP:")).split()
    return int(words[words.index("mem") + 1])
