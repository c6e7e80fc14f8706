"""Requirements files and their check against an environment."""

from importlib import metadata
from pathlib import Path

import pytest

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.service import Image
from snowdrop.sdk.environment import check_requirements
from snowdrop.sdk.requirements import FILES_MAX, read_requirements


def test_lines_comments_continuations_and_other_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text("msgspec>=0.19\nanyio\n")
    (tmp_path / "requirements.txt").write_text(
        "# the environment\n-r base.txt\ntorch>=2.4  # weights\n\n--index-url https://example.com\n"
        "safetensors \\\n  >=0.5 --hash=sha256:aa\nanyio\n"
    )
    found = read_requirements(("-r requirements.txt", "numpy"), tmp_path)
    assert found == ("msgspec>=0.19", "anyio", "torch>=2.4", "safetensors>=0.5", "numpy")


def test_files_that_include_each_other_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("-r b.txt\none\n")
    (tmp_path / "b.txt").write_text("-r a.txt\ntwo\n")
    assert read_requirements(("-r a.txt",), tmp_path) == ("two", "one")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("ok\n???\n", "r.txt:2"),
        ("-e .\n", "r.txt:1"),
        ("-c constraints.txt\n", "r.txt:1"),
        ("\n-r missing.txt\n", "r.txt:2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        read_requirements(("-r r.txt",), tmp_path)
    assert caught.value.where == place
    assert caught.value.next_step


def test_includes_are_bounded(tmp_path: Path) -> None:
    for number in range(FILES_MAX + 1):
        (tmp_path / f"{number}.txt").write_text(f"-r {number + 1}.txt\n")
    with pytest.raises(InvalidInputError, match="too many"):
        read_requirements(("-r 0.txt",), tmp_path)


def test_missing_and_outdated_requirements_are_found() -> None:
    version = metadata.version("msgspec")
    missing = check_requirements(
        (
            f"msgspec=={version}",
            "msgspec>=9999",
            "no-such-package-anywhere>=1",
            'also-not-there ; python_version < "3"',
        )
    )
    assert [(each.requirement, each.found) for each in missing] == [
        ("msgspec>=9999", version),
        ("no-such-package-anywhere>=1", None),
    ]


PROJECT = """
[project]
name = "x"
dependencies = ["torch>=2.4", "numpy"]
[project.optional-dependencies]
Fast_Path = ["xxhash"]
"""


def test_a_project_says_its_dependencies(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    assert read_requirements(("--pyproject pyproject.toml",), tmp_path) == ("torch>=2.4", "numpy")
    with_extra = read_requirements(Image.from_pyproject(extras=("fast-path",)).requirements, tmp_path)
    assert with_extra == ("torch>=2.4", "numpy", "xxhash")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[project]\ndynamic = ['dependencies']", "dynamic"),
        ("[project]\ndependencies = ['-r /etc/passwd']\noptional-dependencies.more = []", "no requirement"),
        ("[project]\ndependencies = 3", "no project"),
        ("[tool]", "no project"),
        ("[project", "no project"),
        ("[project]", "no extra 'more'"),
    ],
)
def test_a_project_that_does_not_say_them_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=told) as caught:
        read_requirements(("--pyproject pyproject.toml[more]",), tmp_path)
    assert caught.value.next_step
    assert caught.value.where.startswith("pyproject.toml")
