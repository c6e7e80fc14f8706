"""Describing a service file in a process of its own."""

import os
from pathlib import Path

import pytest

from snowdrop.domain.errors import InvalidInputError, NotFoundError, SnowdropError, TimedOutError, UserCodeError
from snowdrop.sdk.inspect import describe_service

SERVICE = """
import helper
import snowdrop as sd

print("noise on standard output")

@sd.service(image=sd.Image.from_requirements("requirements.txt"), concurrency=helper.CONCURRENCY)
class Echo:
    @sd.endpoint("/echo")
    def echo(self, item: "Item") -> str:
        return item.text
"""
LATER = """
import dataclasses

@dataclasses.dataclass
class Item:
    text: str
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "service.py"
    path.write_text(text)
    return path


def failure(path: Path, class_name: str | None = None) -> SnowdropError:
    with pytest.raises(SnowdropError) as caught:
        describe_service(path, class_name)
    return caught.value


def test_a_service_is_described_whole(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("CONCURRENCY = 7\n")
    (tmp_path / "requirements.txt").write_text("msgspec>=0.19\n")
    spec = describe_service(write(tmp_path, SERVICE + LATER), None)
    assert (spec.entry, spec.class_name, spec.concurrency) == ("service:Echo", "Echo", 7)
    assert spec.image.requirements == ("msgspec>=0.19",)
    assert spec.endpoints[0].components["Item"]["required"] == ["text"]
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_name_chooses_between_several_classes(tmp_path: Path) -> None:
    one = 'import snowdrop as sd\n@sd.service()\nclass {0}:\n    @sd.endpoint("/")\n    def a(self) -> None: ...\n'
    path = write(tmp_path, one.format("First") + one.format("Second"))
    assert describe_service(path, "Second").entry == "service:Second"
    told = failure(path)
    assert "First" in str(told)
    assert "Second" in str(told)
    assert "First, Second" in str(failure(path, "Third"))


def test_what_is_wrong_with_the_file_is_named(tmp_path: Path) -> None:
    assert isinstance(failure(tmp_path / "absent.py"), NotFoundError)
    assert isinstance(failure(write(tmp_path, "x = 1\n")), InvalidInputError)
    broken = failure(write(tmp_path, "x = 1\ndef broken(:\n"))
    assert isinstance(broken, InvalidInputError)
    assert broken.where == "service.py:2"
    raised = failure(write(tmp_path, "def inner():\n    raise ValueError('no luck')\n\ninner()\n"))
    assert isinstance(raised, UserCodeError)
    assert raised.message == "ValueError: no luck"
    assert raised.where == "service.py:2"
    unresolved = failure(write(tmp_path, SERVICE.replace("import helper", "").replace("helper.CONCURRENCY", "1")))
    assert "Item" in str(unresolved)
    assert "Echo.echo" in str(unresolved)


def test_a_file_that_ends_the_process_is_told_from_one_that_hangs(tmp_path: Path) -> None:
    died = failure(write(tmp_path, "import os\nos.kill(os.getpid(), 9)\n"))
    assert isinstance(died, UserCodeError)
    assert "signal 9" in died.message
    assert "SystemExit" in failure(write(tmp_path, "raise SystemExit(3)\n")).message
    hangs = write(tmp_path, "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    with pytest.raises(TimedOutError, match=r"service\.py"):
        describe_service(hangs, None, inspect_s_max=1.5)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('web = sd.command(["serve", "{port}"], openai=True)', "command"),
        ("async def app(scope, receive, send): ...\nweb = sd.asgi(app)", "asgi"),
    ],
)
def test_a_variable_may_be_the_service(tmp_path: Path, line: str, kind: str) -> None:
    file = tmp_path / "served.py"
    file.write_text(f"import snowdrop as sd\n{line}\n")
    spec = describe_service(file, None)
    assert (spec.class_name, spec.entry) == ("web", "served:web")
    assert getattr(spec, kind) is not None
    assert describe_service(file, "web") == spec
    file.write_text(f"import snowdrop as sd\n{line}\nother = web\nthird = sd.command(['x', '{{port}}'])\n")
    with pytest.raises(InvalidInputError, match="several services: other, third, web"):
        describe_service(file, None)
