"""The section ``<standbyclient>`` of a ZConfig file; ``component.xml`` is its schema."""

from __future__ import annotations

from typing import Any

from standby_zodb.storage import ClientStorage
from standby_zodb.topology import Preference


class StandbyClient:
    """What the section says."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.name = config.getSectionName()
        preference = Preference.parse(config.prefer)
        if preference.reads_only and not config.read_only:
            raise ValueError(f"prefer {config.prefer} needs read-only true")

    def open(self) -> ClientStorage:
        """Opens the storage."""
        config = self.config
        options: dict[str, Any] = {
            key: getattr(config, key)
            for key in ("blob_cache_size", "blob_cache_size_check", "client_label")
            if getattr(config, key) is not None
        }
        if config.ssl:
            options["ssl"], options["ssl_server_hostname"] = config.ssl
        return ClientStorage(
            [server.address for server in config.server],
            prefer=config.prefer,
            storage=config.storage,
            name=config.name,
            cache=config.cache_path,
            cache_size=config.cache_size,
            blob_dir=config.blob_dir,
            shared_blob_dir=config.shared_blob_dir,
            read_only=config.read_only,
            read_only_fallback=config.read_only_fallback,
            server_sync=config.server_sync,
            wait_timeout=config.wait_timeout,
            **options,
        )
