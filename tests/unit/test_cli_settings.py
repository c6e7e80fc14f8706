"""Settings from four places, and errors that say which one was wrong."""

from pathlib import Path

import pytest

from snowdrop.cli.settings_file import Resolved, resolve
from snowdrop.domain.errors import InvalidInputError


def read(folder: Path, toml: str = "", env: dict[str, str] | None = None, **flags: object) -> Resolved:
    (folder / "config.toml").write_text(toml)
    return resolve({"state": str(folder), **{k.replace("__", "."): v for k, v in flags.items()}}, env or {})


def test_later_places_win_and_sources_are_named(tmp_path: Path) -> None:
    toml = "[gateway]\nport = 1\nhost = 'a'\nworkers = 3\n"
    env = {"SNOWDROP_GATEWAY_PORT": "2", "SNOWDROP_GATEWAY_HOST": "b", "SNOWDROP_AGENT_UNSAFE_NO_SANDBOX": "true"}
    got = read(tmp_path, toml, env, gateway__port=3, gateway__host=None)
    assert (got.settings.gateway.port, got.settings.gateway.host, got.settings.gateway.workers) == (3, "b", 3)
    assert got.settings.agent.unsafe_no_sandbox is True
    rows = {name: (value, source) for name, value, source in got.rows()}
    assert rows["gateway.port"] == ("3", "flag")
    assert rows["gateway.host"] == ("b", "SNOWDROP_GATEWAY_HOST")
    assert rows["gateway.workers"] == ("3", str(tmp_path / "config.toml"))
    assert rows["control.tick_s"] == ("0.5", "default")
    assert rows["content.origin_url"] == ((tmp_path / "origin").as_uri(), "state folder")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[gateway]\nport = 'many'\n", "gateway.port"),
        ("[gateway]\nprot = 1\n", "gateway.prot"),
        ("gateway = 3\n", "gateway"),
        ("[nothing]\nx = 1\n", "nothing.x"),
        ("[gateway\n", "not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_setting(tmp_path: Path, toml: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        read(tmp_path, toml)
    assert caught.value.where == str(tmp_path / "config.toml")


def test_a_wrong_variable_or_flag_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"gateway\.port = 'x'") as caught:
        read(tmp_path, env={"SNOWDROP_GATEWAY_PORT": "x"})
    assert caught.value.where == "SNOWDROP_GATEWAY_PORT"
    with pytest.raises(InvalidInputError, match=r"gateway\.workers") as caught:
        read(tmp_path, gateway__workers="two")
    assert caught.value.where == "flag"


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such") as caught:
        resolve({"state": str(tmp_path)}, {}, tmp_path / "absent.toml")
    assert "absent.toml" in caught.value.where
    other = tmp_path / "other.toml"
    other.write_text("[gateway]\nport = 9\n")
    assert resolve({"state": str(tmp_path)}, {"SNOWDROP_CONFIG": str(other)}).settings.gateway.port == 9
