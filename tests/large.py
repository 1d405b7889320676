"""Transactions of very many objects, as an import makes them, sent faster than a stock client can."""

import contextlib
import pickle
import threading
import time

from persistent.mapping import PersistentMapping

from test_alone import call, receive, registered, send

# Two pickles, as ZODB's records are.
RECORD = b"\x80\x03cpersistent\nPersistent\nq\x00.\x80\x03}q\x00."


def stores(oids):
    """The messages that store new objects, each in its frame, some thousands at a time."""
    marked = pickle.dumps((0, True, "storea", (b"THE--OID", bytes(8), RECORD, 7)), 3)
    before, after = marked.split(b"THE--OID")
    length = len(marked).to_bytes(4, "big")
    piece = []
    for oid in oids:
        piece += (length, before, oid.to_bytes(8, "big"), after)
        if len(piece) >= 40000:
            yield b"".join(piece)
            piece = []
    yield b"".join(piece)


class Answers(threading.Thread):
    """Takes what comes over a connection, as a stock client does also while it sends."""

    def __init__(self, sock):
        super().__init__(daemon=True)
        self.sock, self.found, self.ended, self.news = sock, {}, False, threading.Condition()
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while content := receive(self.sock):
                # An invalidation may be long; nobody looks at it.
                message = pickle.loads(content) if len(content) < 1 << 20 else (0, True, "long", ())
                with self.news:
                    self.found[message[0]] = message[2:]
                    self.news.notify()
        with self.news:
            self.ended = True
            self.news.notify()

    def to(self, number, timeout):
        with self.news:
            assert self.news.wait_for(lambda: number in self.found or self.ended, timeout), "no answer"
            assert number in self.found, "the server has closed the connection"
            return self.found[number]


def commit_many(address, oids, timeout=600):
    """Stores new objects in one transaction; how long the stores, the vote and the end took. An error is raised."""
    sock = registered(address, read_only=False)
    sock.settimeout(timeout)
    answers = Answers(sock)
    times = [time.monotonic()]
    send(sock, pickle.dumps((0, True, "tpc_begin", (7, b"", b"", {}, None, " ")), 3))
    try:
        for piece in stores(oids):
            sock.sendall(piece)
        # Answered after them.
        for number, method, arguments in ((2, "lastTransaction", ()), (3, "vote", (7,)), (4, "tpc_finish", (7,))):
            send(sock, call(number, method, *arguments))
            kind, told = answers.to(number, timeout)
            # With pickles an error is a reply of its class and itself.
            if kind == ".error" or isinstance(told, tuple):
                raise Refused(told)
            assert method != "vote" or not told, "%d conflicts" % len(told)
            times.append(time.monotonic())
    finally:
        sock.close()
    return [after - before for before, after in zip(times, times[1:])]


class Refused(Exception):
    pass


class Others(threading.Thread):
    """A client that changes an object of its own all the time, in one transaction after the other."""

    def __init__(self, client, name):
        super().__init__(daemon=True)
        self.client, self.name, self.taken, self.error = client, name, [], None
        self.stopping = threading.Event()
        client.commit(lambda root: root.update({name: PersistentMapping()}))

    def run(self):
        number = 0
        try:
            while not self.stopping.is_set():
                number += 1
                started = time.monotonic()
                self.client.commit(lambda root: root[self.name].update(x=number))
                self.taken.append((started, time.monotonic() - started))
        except Exception as error:
            self.error = error

    def stop(self):
        self.stopping.set()
        self.join(60)
        if self.error:
            raise self.error

    def latencies(self, begin, end):
        """Of commits that began between two moments, in order of length."""
        return sorted(taken for started, taken in self.taken if begin <= started < end)
