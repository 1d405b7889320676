"""URIs for ``zodburi``: ``standby://host1,host2:8100/?storage=1&wait_timeout=30``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from standby_zodb.storage import ClientStorage
from standby_zodb.topology import Address, Preference, address

PORT = 8100
"""The port of an address without one."""

_UNITS = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def _boolean(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True}.get(text.lower())
    if value is None:
        if text.lower() not in ("0", "false", "no", "off"):
            raise ValueError(f"{text!r} is neither true nor false")
        return False
    return value


def _bytes(text: str) -> int:
    number, unit = text[:-2].strip(), _UNITS.get(text[-2:].lower())
    return int(text) if unit is None else int(number) * unit


_ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "storage": str,
    "name": str,
    "prefer": str,
    "client": str,
    "var": str,
    "cache": str,
    "client_label": str,
    "blob_dir": str,
    "cache_size": _bytes,
    "blob_cache_size": _bytes,
    "blob_cache_size_check": int,
    "wait_timeout": int,
    "wait": _boolean,
    "read_only": _boolean,
    "read_only_fallback": _boolean,
    "server_sync": _boolean,
    "shared_blob_dir": _boolean,
}


def resolve(uri: str) -> tuple[Callable[[], ClientStorage], dict[str, str]]:
    """Gives what opens the storage, and what the URI says of the database.

    A port stands for the hosts before it that have none of their own: in
    ``standby://db1,db2:8100`` for both.
    """
    parts = urlsplit(uri)
    if parts.scheme != "standby" or not parts.netloc or parts.path not in ("", "/"):
        raise ValueError(f"{uri!r} is not of the form standby://HOST[:PORT][,HOST[:PORT]...]/?...")
    addresses: list[Address] = []
    port = PORT
    for text in reversed(parts.netloc.split(",")):
        host, port = _tcp(address(text, port), uri)
        addresses.insert(0, (host, port))
    options: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for key, text in parse_qsl(parts.query, keep_blank_values=True):
        read = _ARGUMENTS.get(key)
        if read is None:
            rest[key] = text
            continue
        try:
            options[key] = read(text)
        except ValueError as error:
            raise ValueError(f"{key} in {uri!r}: {error}") from None
    Preference.parse(options.get("prefer", "primary"))

    def factory() -> ClientStorage:
        return ClientStorage(addresses, **options)

    return factory, rest


def _tcp(found: Address, uri: str) -> tuple[str, int]:
    if isinstance(found, str):
        raise ValueError(f"{uri!r} names a path; only hosts and ports may stand there")
    return found
