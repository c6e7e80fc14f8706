"""What people and programs read: waterfalls, amounts, errors and exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from platform_helpers import caller, receipt
from snowdrop.cli.app import app
from snowdrop.cli.output import human_age, human_bytes, human_ns
from snowdrop.cli.receipts import waterfall
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.receipt import ContentBytes, Span

MS = 1_000_000


def test_amounts() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 2 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert [human_ns(n) for n in (1_500_000, 999_000_000, 2_500_000_000)] == ["1.5 ms", "999.0 ms", "2.50 s"]
    assert [human_age(n * 10**9, 0) for n in (5, 61, 7_300, 200_000)] == ["5 s", "1 min", "2 h", "2 d"]
    assert human_age(0, 10**9) == "0 s"


def test_a_waterfall_draws_phases_details_and_the_rest() -> None:
    spans = (
        Span(name="import", start_unix_ns=100 * MS, end_unix_ns=200 * MS),
        Span(name="startup", start_unix_ns=250 * MS, end_unix_ns=400 * MS),
        Span(name="weights", start_unix_ns=260 * MS, end_unix_ns=360 * MS, parent="startup", note="from disk"),
    )
    felt = caller("req-1", arrived=0, admitted=450 * MS, first_byte=500 * MS)
    made = receipt(spans=spans, caller=felt, content=ContentBytes(disk=2048), started=100 * MS, ready=400 * MS)
    lines = [line.plain.rstrip() for line in waterfall(made, width=100)]
    assert lines[0] == "rcp-1  embed on node-0, request req-1"
    assert all(len(line) <= 100 for line in lines)
    drawn = {line.split()[0]: line for line in lines[2:] if "·" not in line}
    assert list(drawn) == ["activate", "import", "startup", "route", "answer", "unaccounted", "waited", "bytes"]
    left = drawn["activate"].index("█")
    whole = len(drawn["answer"]) - left
    for name, begin, length in (("import", 0.2, 0.2), ("startup", 0.5, 0.3), ("answer", 0.9, 0.1)):
        assert abs(drawn[name].index("█") - left - begin * whole) <= 1, name
        assert abs(drawn[name].count("█") - length * whole) <= 1, name
    assert "100.0 ms" in drawn["import"]
    detail = next(line for line in lines if "· weights" in line)
    assert abs(detail.count("╌") - 0.2 * whole) <= 1
    assert "█" not in detail
    assert lines.index(detail) == lines.index(drawn["startup"]) + 1
    assert "50.0 ms" in drawn["unaccounted"]
    assert "10.0 %" in drawn["unaccounted"]
    assert "500.0 ms" in drawn["waited"]
    assert "2.0 KiB disk" in drawn["bytes"]


def test_a_failed_start_nobody_waited_for_is_drawn_too() -> None:
    error = ErrorBody(kind="user_code", message="boom", where="startup")
    lines = [line.plain for line in waterfall(receipt(outcome="failed: boom", error=error, started=5, ready=5))]
    assert "nobody waiting" in lines[0]
    assert lines[-1].strip() == "error: boom [startup]"


COMMANDS = [
    ["ps"],
    ["describe", "x"],
    ["receipts"],
    ["usage"],
    ["model", "ls"],
    ["key", "ls"],
    ["delete", "x"],
    ["scale", "x", "--max", "2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_the_platform_every_command_says_how_to_start_it(tmp_path: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, ["--state", str(tmp_path), *command])
    assert result.exit_code == 1
    assert "the platform is not running" in result.stderr
    assert "snowdrop up" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_with_json_an_error_is_one_document(tmp_path: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, ["--state", str(tmp_path), "--json", *command])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["where"]) == ("platform_down", str(tmp_path))


def test_bad_settings_exit_with_two(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[gateway]\nport = 'x'\n")
    result = CliRunner().invoke(app, ["--state", str(tmp_path), "ps"])
    assert result.exit_code == 2
    assert "gateway.port" in result.stderr
    assert CliRunner().invoke(app, ["--state", str(tmp_path), "ps", "--help"]).exit_code == 0
