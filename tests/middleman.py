"""Stands between clients and a server, and breaks a connection at the worst moment of a commit."""

import contextlib
import socket
import struct
import threading

LEN = struct.Struct(">I")
# Bytes of a socket at once.
PIECE = 1 << 16


class Middleman:
    """Passes bytes on between clients and `server`, both ways, in whole messages.

    The next `tpc_finish` that a client sends, once `breaks` is set, breaks its connection:
    "before": the server never gets it; "after": the server gets it, and the client no answer; "late": the
    server gets it when `release` is called, and for that long its connection stays open.
    """

    def __init__(self, server):
        self.server = server
        self.breaks = None
        self.broken = threading.Event()
        self._release = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads = []
        self._closing = False
        self._start(self._accept)

    @property
    def address(self):
        return self._listener.getsockname()

    def release(self):
        self._release.set()

    def close(self):
        self._closing = True
        self._release.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        # One that has just accepted a client may not have seen that; none keeps the process alive.
        for thread in self._threads:
            thread.join(1)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while not self._closing:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.server, timeout=5)
            except OSError:
                continue
            server.settimeout(None)
            self._sockets += [client, server]
            self._start(self._answers, server, client)
            self._start(self._calls, client, server)

    def _answers(self, server, client):
        with contextlib.suppress(OSError):
            while piece := server.recv(PIECE):
                client.sendall(piece)
        end(client)

    def _calls(self, client, server):
        buffered = b""
        with contextlib.suppress(OSError):
            while piece := client.recv(PIECE):
                buffered += piece
                while len(buffered) >= 4 and len(buffered) >= 4 + LEN.unpack(buffered[:4])[0]:
                    end_of_message = 4 + LEN.unpack(buffered[:4])[0]
                    message, buffered = buffered[:end_of_message], buffered[end_of_message:]
                    if self.breaks and b"tpc_finish" in message:
                        return self._break(client, server, message)
                    server.sendall(message)
        end(server)

    def _break(self, client, server, message):
        how, self.breaks = self.breaks, None
        if how == "after":
            # The answer is not to be faster than the end of the connection.
            end(client)
            server.sendall(message)
        elif how == "late":
            end(client)
            self.broken.set()
            self._release.wait(60)
            with contextlib.suppress(OSError):
                server.sendall(message)
        else:
            end(client)
            end(server)
        self.broken.set()


def end(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def kill_when(process, event):
    """Kills a process as soon as something has happened; returns the thread that does it."""
    thread = threading.Thread(target=lambda: event.wait(60) and process.kill(), daemon=True)
    thread.start()
    return thread
