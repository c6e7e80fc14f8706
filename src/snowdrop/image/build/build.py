"""A build: the base, packages from the lock, copied files; each a layer, kept by what it is made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import msgspec

from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.image import ENTRIES_MAX, ImageConfig
from snowdrop.domain.service import Image, ImageCopy
from snowdrop.image.build.bases import DEBIAN_MIRROR, TarImage, open_base
from snowdrop.image.build.cache import BuildCache, BuiltLayer, chain_key, file_digest, write_tar
from snowdrop.image.build.lock import Lock, encode_lock, read_lock, usable
from snowdrop.image.build.packages import ENV_FOLDER, LIBC, install, resolve
from snowdrop.image.opening import ReachOptions

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_LEFT_OUT = frozenset({"__pycache__", ".git"})


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`lock` is the lock's path; `locked` refuses to write it, `upgrade` resolves and makes the base anew."""

    lock: Path
    reach: ReachOptions
    locked: bool = False
    upgrade: bool = False
    debian_mirror: str = DEBIAN_MIRROR


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What to push, and whether the base's layers are far away. The caller closes `source`."""

    source: TarImage
    fetch: bool


def build_image(
    image: Image,
    folder: Path,
    cache: BuildCache,
    options: BuildOptions,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> Built:
    """Makes what the cache does not have of `image`, whose copied files lie below `folder`; writes the lock.

    Raises InvalidInputError or NotFoundError for what is wrong with the description, ConflictError as the lock is
    another one, UnavailableError, TimedOutError or StorageFullError.
    """
    machine = _MACHINES.get(options.reach.platform.architecture)
    if machine is None:
        raise InvalidInputError(
            f"no environment can be made for {options.reach.platform}",
            where="platform",
            next_step=f"it can for {', '.join(_MACHINES)}",
        )
    copies = [(copy, _members(copy, folder)) for copy in image.copies]
    report(f"base {image.base}")
    base, is_remote = open_base(image, cache, options.reach, mirror=options.debian_mirror, fresh=options.upgrade)
    try:
        below = base.image()
        pins = _pins(image, below.digest, machine=machine, cache=cache, options=options, report=report)
        layers = list(
            _packages(image, below.digest, pins, machine=machine, cache=cache, options=options, report=report)
        )
        for copy, members in copies:
            report(f"copy {copy.source}")
            layers.append(_copied(members, cache))
    except BaseException:
        base.close()
        raise
    config = _config(below.config) if pins else below.config
    return Built(
        source=TarImage(f"{image.base} + {len(layers)} built", config, tuple(layers), base), fetch=is_remote
    )


def _pins(
    image: Image,
    base: str,
    *,
    machine: str,
    cache: BuildCache,
    options: BuildOptions,
    report: Callable[[str], None],
) -> str:
    """The lock's pins, resolved and written if it may not be kept to."""
    wants = chain_key(image.base, image.python, machine, LIBC, *image.apt_packages, "", *image.requirements)
    where = str(options.lock)
    lock = read_lock(options.lock)
    there = usable(
        lock,
        wants=wants,
        base=base,
        where=where,
        locked=options.locked,
        upgrade=options.upgrade,
    )
    if there is not None:
        return there.pins
    pins = ""
    if image.requirements:
        report(f"resolving {len(image.requirements)} requirements")
        with cache.work() as work:
            pins = resolve(
                image.requirements,
                python=image.python,
                machine=machine,
                index_url=image.index_url,
                before=lock.pins if lock is not None and not options.upgrade else "",
                work=work,
                where="requirements",
            )
    new = options.lock.with_name(f".{options.lock.name}.new")
    new.write_text(encode_lock(Lock(wants=wants, base=base, pins=pins)), "utf-8")
    new.replace(options.lock)
    return pins


def _packages(
    image: Image,
    base: str,
    pins: str,
    *,
    machine: str,
    cache: BuildCache,
    options: BuildOptions,
    report: Callable[[str], None],
) -> Iterator[BuiltLayer]:
    if not pins:
        return

    def make(path: Path) -> None:
        report("installing packages")
        with cache.work() as work:
            made = install(
                pins,
                python=image.python,
                machine=machine,
                index_url=image.index_url,
                work=work,
                where=str(options.lock),
            )
            write_tar(path, _walk(made, PurePosixPath(ENV_FOLDER)))

    yield cache.layer(chain_key("packages", base, image.python, machine, LIBC, pins), make)


def _copied(members: list[tuple[str, Path]], cache: BuildCache) -> BuiltLayer:
    with cache.work() as work:
        made = work / "copy.tar"
        write_tar(made, members)
        # Its own bytes are its inputs: files that change while they are read are not taken for what they were.
        key = chain_key("copy", file_digest(made))

        def make(path: Path) -> None:
            made.replace(path)

        return cache.layer(key, make)


def _members(copy: ImageCopy, folder: Path) -> list[tuple[str, Path]]:
    source = folder / copy.source
    target = PurePosixPath(copy.target)
    if not target.is_absolute() or ".." in target.parts or target == PurePosixPath("/"):
        raise InvalidInputError(
            f"{copy.target!r} is no place in an image", where="Image.copy", next_step="name an absolute path"
        )
    if not source.resolve().is_relative_to(folder.resolve()):
        raise InvalidInputError(
            f"{copy.source!r} is outside of the service's folder",
            where="Image.copy",
            next_step="copy what lies beside the service's file, or below",
        )
    if not source.exists():
        raise NotFoundError(
            f"there is no {copy.source}", where="Image.copy", next_step=f"name it relative to {folder}"
        )
    return list(_walk(source, target.relative_to("/")))


def _walk(source: Path, target: PurePosixPath) -> Iterator[tuple[str, Path]]:
    yield str(target), source
    if not source.is_dir():
        return
    count = 0
    for parent, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in (*folders, *files):
            found = Path(parent, name)
            if not (found.is_symlink() or found.is_dir() or found.is_file()):
                raise InvalidInputError(
                    "is neither file, directory nor link", where=str(found), next_step="move it elsewhere"
                )
            count += 1
            if count > ENTRIES_MAX:
                raise InvalidInputError(
                    "holds too many files", where=str(source), next_step=f"at most entries_max={ENTRIES_MAX}"
                )
            yield str(target / found.relative_to(source)), found


def _config(config: ImageConfig) -> ImageConfig:
    """With the packages on the paths of programs and of Python."""
    env = dict(line.partition("=")[::2] for line in config.env)
    for name, place in (("PATH", f"/{ENV_FOLDER}/bin"), ("PYTHONPATH", f"/{ENV_FOLDER}")):
        env[name] = f"{place}:{env[name]}" if env.get(name) else place
    return msgspec.structs.replace(config, env=tuple(f"{name}={value}" for name, value in env.items()))
