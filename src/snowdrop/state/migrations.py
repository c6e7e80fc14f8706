"""The SQLite schema, as numbered steps. A step that has been released never changes; a new one is added.

Rows hold the whole value as JSON in `body`; the columns beside it are what queries look at. The tenant is the
first column of every key.
"""

from __future__ import annotations

from snowdrop.state.secrets import SECRET_TABLES
from snowdrop.state.sqlite_scaling import SCALING_TABLES, WAIT_TABLES
from snowdrop.state.sqlite_tasks import TASK_HOOK_INDEX, TASK_TABLES

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE model (
            tenant TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (tenant, name)) WITHOUT ROWID""",
        """CREATE TABLE deployment (
            tenant TEXT NOT NULL, name TEXT NOT NULL, generation INTEGER NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (tenant, name)) WITHOUT ROWID""",
        """CREATE TABLE revision (
            tenant TEXT NOT NULL, deployment TEXT NOT NULL, id TEXT NOT NULL,
            created_unix_ns INTEGER NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (tenant, deployment, id)) WITHOUT ROWID""",
        """CREATE TABLE replica (
            tenant TEXT NOT NULL, deployment TEXT NOT NULL, id TEXT NOT NULL,
            started_unix_ns INTEGER NOT NULL, ended INTEGER NOT NULL, version INTEGER NOT NULL,
            body BLOB NOT NULL,
            PRIMARY KEY (tenant, deployment, id)) WITHOUT ROWID""",
        "CREATE INDEX replica_living ON replica (ended, started_unix_ns)",
        """CREATE TABLE receipt (
            tenant TEXT NOT NULL, id TEXT NOT NULL, deployment TEXT NOT NULL,
            started_unix_ns INTEGER NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (tenant, id)) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX receipt_id ON receipt (id)",
        "CREATE INDEX receipt_time ON receipt (tenant, deployment, started_unix_ns)",
        """CREATE TABLE usage (
            tenant TEXT NOT NULL, node TEXT NOT NULL, source TEXT NOT NULL, sequence INTEGER NOT NULL,
            deployment TEXT NOT NULL, revision TEXT NOT NULL, replica TEXT NOT NULL,
            unit TEXT NOT NULL, detail TEXT NOT NULL, quantity INTEGER NOT NULL,
            from_unix_ns INTEGER NOT NULL, to_unix_ns INTEGER NOT NULL,
            PRIMARY KEY (tenant, node, source, sequence)) WITHOUT ROWID""",
        # The identity of a fact does not depend on whose it is: a repeat is found by this key.
        "CREATE UNIQUE INDEX usage_fact ON usage (node, source, sequence)",
        "CREATE INDEX usage_sum ON usage (tenant, deployment, unit, detail)",
        """CREATE TRIGGER usage_is_append_only BEFORE UPDATE ON usage
            BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END""",
        """CREATE TRIGGER usage_is_kept BEFORE DELETE ON usage
            BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END""",
        """CREATE TABLE api_key (
            tenant TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (tenant, name)) WITHOUT ROWID""",
    ),
    (
        # Stays when the model is removed: a ref that was valid before must not be believed again.
        """CREATE TABLE ref_seen (
            tenant TEXT NOT NULL, name TEXT NOT NULL, generation INTEGER NOT NULL, manifest TEXT NOT NULL,
            PRIMARY KEY (tenant, name)) WITHOUT ROWID""",
    ),
    TASK_TABLES,
    SCALING_TABLES,
    WAIT_TABLES,
    SECRET_TABLES,
    TASK_HOOK_INDEX,
)
