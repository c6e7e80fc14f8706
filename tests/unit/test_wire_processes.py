"""The platform's own processes import the platform, wherever they are started."""

import subprocess
from pathlib import Path

from snowdrop.wire.processes import own_process

RUN_S_MAX = 60.0


def test_a_file_beside_that_is_called_like_a_library_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('the file of somebody else')")
    command = [*own_process("snowdrop.main"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
