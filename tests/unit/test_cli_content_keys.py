import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from snowdrop.cli.app import app
from snowdrop.content.keys import key_domain, tenant_key
from snowdrop.domain.ids import TenantId


def run(state: Path, *words: str) -> Any:
    result = CliRunner().invoke(
        app, ["--state", str(state), "--tenant", "acme", "--json", "model", "keys", *words]
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_keys_are_listed_by_their_ids_and_rotated(tmp_path: Path) -> None:
    assert run(tmp_path, "ls") == []
    old = tenant_key(tmp_path / "content-keys", TenantId("acme"))
    new = run(tmp_path, "rotate")["key_domain"]
    assert run(tmp_path, "ls") == [
        {"key_domain": key_domain(old), "is_current": False},
        {"key_domain": new, "is_current": True},
    ]
    assert key_domain(tenant_key(tmp_path / "content-keys", TenantId("acme"))) == new
