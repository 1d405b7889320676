"""Tells the neighbours on eth0 that an address is here now, as `arping -U` does.

    python announce.py 10.77.0.100
"""

import socket
import struct
import sys

host = socket.inet_aton(sys.argv[1])
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind(("eth0", 0))
    mac = sock.getsockname()[4]
    # An ARP request (RFC 826) of that address for itself, to everybody.
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    sock.send(b"\xff" * 6 + mac + b"\x08\x06" + head + mac + host + bytes(6) + host)
