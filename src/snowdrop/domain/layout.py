"""Where everything lies inside the state folder. The only place that knows these names."""

from __future__ import annotations

from pathlib import Path

import msgspec

from snowdrop.domain.errors import InvalidInputError

SOCKET_PATH_BYTES_MAX = 107
"""sun_path holds 108 bytes with the closing NUL (unix(7))."""
STATE_MARK = ".snowdrop-state"
"""An empty file in each state folder, so that whatever packs a folder knows one wherever it lies."""


def is_state_folder(folder: Path) -> bool:
    """Whether a platform has its state there."""
    return (folder / STATE_MARK).is_file()


class StateLayout(msgspec.Struct, frozen=True):
    """Paths below `root`, which must be absolute. Raises InvalidInputError if sockets could not be made there."""

    root: Path

    def __post_init__(self) -> None:
        longest = len(str(self.sockets / "rep-000000000000.sock").encode())
        if longest > SOCKET_PATH_BYTES_MAX:
            raise InvalidInputError(
                f"the state folder's path is too long for unix sockets by {longest - SOCKET_PATH_BYTES_MAX} bytes",
                where=str(self.root),
                next_step="choose a shorter one with --state",
            )

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def database(self) -> Path:
        return self.root / "control.db"

    @property
    def journal(self) -> Path:
        return self.root / "usage.db"

    @property
    def keys(self) -> Path:
        """Keys that sign refs and that are trusted to (`content.signing`)."""
        return self.root / "keys"

    @property
    def origin(self) -> Path:
        return self.root / "origin"

    @property
    def content_keys(self) -> Path:
        """Tenants' keys for private content, one file each."""
        return self.root / "content-keys"

    @property
    def secret_keys(self) -> Path:
        """Keys of the platform that wrap secrets, one file each; not in the database, whose backups go about."""
        return self.root / "secret-keys"

    @property
    def volumes(self) -> Path:
        """Persistent volumes: a folder per tenant, whose owner may write them."""
        return self.root / "volumes"

    @property
    def ingest_index(self) -> Path:
        """What pushes from here know of the origin's chunks, and how far they came: only a cache."""
        return self.root / "ingest.db"

    @property
    def image_layers(self) -> Path:
        """Layers of images that are being pushed, until the push has ended well."""
        return self.root / "image-layers"

    @property
    def image_builds(self) -> Path:
        """Layers that builds of images have made, kept for the next build: only a cache."""
        return self.root / "image-builds"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def mounts(self) -> Path:
        """Mounted directories of models that are not complete yet."""
        return self.cache / "mounts"

    @property
    def mounts_record(self) -> Path:
        """The directories that people asked for."""
        return self.root / "mounts.json"

    @property
    def replica_logs(self) -> Path:
        return self.root / "logs"

    @property
    def process_logs(self) -> Path:
        return self.root / "platform"

    @property
    def tasks(self) -> Path:
        """Bodies of tasks' requests and answers that are too large for the database."""
        return self.root / "tasks"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def sockets(self) -> Path:
        """Replicas' sockets."""
        return self.run / "r"

    @property
    def calls(self) -> Path:
        """Where gateway workers take calls between services, a socket each."""
        return self.run / "calls"

    @property
    def control_socket(self) -> Path:
        """Control's HTTP API."""
        return self.run / "control.sock"

    @property
    def link_socket(self) -> Path:
        """Where agents and gateways meet control."""
        return self.run / "link.sock"

    @property
    def agent_socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def owner_socket(self) -> Path:
        """Where gateway workers meet the owner of the queues."""
        return self.run / "owner.sock"

    @property
    def metrics_socket(self) -> Path:
        """Where the gateway serves the whole platform's metrics."""
        return self.run / "metrics.sock"

    @property
    def edge_socket(self) -> Path:
        """Where the gateway's workers take requests from the HTTP/2 listener."""
        return self.run / "edge.sock"

    @property
    def settings(self) -> Path:
        """The settings that the running platform was started with."""
        return self.run / "settings.json"

    @property
    def lock(self) -> Path:
        """Locked by the supervisor for as long as it lives: one platform per state folder."""
        return self.run / "lock"

    @property
    def platform(self) -> Path:
        """Who runs: supervisor and process ids, the gateway's address."""
        return self.run / "platform.json"

    def make(self) -> None:
        """Creates the folders, for the owner only."""
        for folder in (self.root, self.run, self.sockets, self.calls, self.replica_logs, self.process_logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.root / STATE_MARK).touch(mode=0o600)
