"""A cable with a delay: passes Ethernet frames on between two interfaces of a network namespace.

    python tests/wire.py INTERFACE INTERFACE MILLISECONDS
    python tests/wire.py --whole INTERFACE

each way takes so long. A line "MILLISECONDS PART" on its standard input changes that, and the part of the frames
that is lost; it ends with its standard input. The second form makes the machine at an end send whole frames.
"""

import collections
import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
# Checksums, segmentation and coalescing that the kernel would put off until a real card.
OFFLOADS = {"tx": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


def without_offloads(interface):
    """A frame that a packet socket passes on must be whole: nobody completes it later."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in OFFLOADS.values():
            buffer = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(buffer))
            fcntl.ioctl(sock, SIOCETHTOOL, request)


def open_interface(interface):
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    sock.bind((interface, 0))
    sock.setblocking(False)
    return sock


def main():
    if sys.argv[1] == "--whole":
        return without_offloads(sys.argv[2])
    first, second = sys.argv[1:3]
    delay, lost = float(sys.argv[3]) / 1000, 0
    ends = open_interface(first), open_interface(second)
    waiting = collections.deque()
    print("ready", flush=True)
    while True:
        timeout = max(0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([*ends, sys.stdin], [], [], timeout)
        if sys.stdin in readable:
            told = os.read(0, 4096)
            if not told:
                return
            milliseconds, lost = map(float, told.splitlines()[-1].split())
            delay = milliseconds / 1000
        now = time.monotonic()
        for end, other in (ends, ends[::-1]):
            if end in readable:
                for _ in range(100):
                    try:
                        frame, address = end.recvfrom(65536)
                    except BlockingIOError:
                        break
                    # Not what was sent here just before.
                    if address[2] != socket.PACKET_OUTGOING and random.random() >= lost:
                        waiting.append((now + delay, other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            try:
                end.send(frame)
            except OSError:
                # The other end is down, or full: a cable loses frames.
                pass


if __name__ == "__main__":
    main()
