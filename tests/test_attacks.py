"""What clients at the ports may do, and what the others see of it."""

import contextlib
import itertools
import os
import socket
import threading
import time

from test_alone import call, registered
from zeo_client import Client


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
    cluster = nodes.cluster().start()
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
