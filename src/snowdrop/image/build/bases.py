"""What an environment stands on: a minimal Debian made here by mmdebstrap, or an image from elsewhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from snowdrop.domain.errors import InvalidInputError, NotFoundError, UnavailableError
from snowdrop.domain.image import ImageConfig
from snowdrop.domain.service import Image
from snowdrop.image.build.cache import MTIME_S, BuildCache, BuiltLayer, chain_key
from snowdrop.image.build.tools import ToolFailed, run_tool
from snowdrop.image.opening import ReachOptions, open_image
from snowdrop.image.source import ImageSource, Layer, Read, SourceImage

DEBIAN_PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_PACKAGES = ("ca-certificates", "python3")
DEBOOTSTRAP_S_MAX = 1_800.0
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:=[A-Za-z0-9.+:~-]+)?")
_DEBIAN = re.compile(r"debian:([a-z]+)")


class TarImage:
    """Layers that lie here as plain tars, on what another source gives."""

    def __init__(
        self, name: str, config: ImageConfig, layers: tuple[BuiltLayer, ...], below: ImageSource | None = None
    ) -> None:
        self.name = name
        self._below = below
        self._config = config
        self._paths = {layer.digest: layer.path for layer in layers}
        self._layers = tuple(
            Layer(key=layer.digest, digest=layer.digest, size=layer.size, diff_id=layer.digest) for layer in layers
        )

    def image(self) -> SourceImage:
        under = self._below.image().layers if self._below is not None else ()
        layers = (*under, *self._layers)
        named = chain_key(*(layer.digest or layer.diff_id for layer in layers))
        return SourceImage(config=self._config, layers=layers, digest=f"sha256:{named}")

    def read_layer(self, layer: Layer, offset: int) -> AbstractContextManager[Read]:
        path = self._paths.get(layer.digest)
        if path is None:
            assert self._below is not None, "a layer is of this source or of the one below"
            return self._below.read_layer(layer, offset)
        return _read_file(path, offset)

    def close(self) -> None:
        if self._below is not None:
            self._below.close()


def open_base(
    image: Image, cache: BuildCache, reach: ReachOptions, *, mirror: str, fresh: bool
) -> tuple[ImageSource, bool]:
    """The base, and whether its layers are far away. `debian:SUITE` is made if the cache has none, or `fresh`.

    Raises InvalidInputError or NotFoundError, what `open_image` raises, UnavailableError or TimedOutError.
    """
    debian = _DEBIAN.fullmatch(image.base)
    if debian is None:
        if image.apt_packages:
            raise InvalidInputError(
                f"{image.base[:200]!r} takes no Debian packages",
                where="Image.apt",
                next_step="take a base `debian:SUITE`, or an image that has them",
            )
        return open_image(image.base, reach)
    suite = debian[1]
    if DEBIAN_PYTHONS.get(suite) != image.python:
        having = ", ".join(f"debian:{name} has {version}" for name, version in DEBIAN_PYTHONS.items())
        raise InvalidInputError(
            f"{image.base} has no Python {image.python}",
            where="Image.base",
            next_step=f"{having}; or name an image",
        )
    for package in image.apt_packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidInputError(
                f"{package[:200]!r} is no package", where="Image.apt", next_step="write NAME or NAME=VERSION"
            )
    packages = sorted({*DEBIAN_PACKAGES, *image.apt_packages})
    architecture = reach.platform.architecture
    key = chain_key("debian", suite, architecture, mirror, *packages)
    layer = cache.layer(key, lambda path: _debootstrap(path, suite, architecture, mirror, packages), fresh=fresh)
    config = ImageConfig(
        env=("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",), architecture=architecture
    )
    return TarImage(image.base, config, (layer,)), False


def _debootstrap(path: Path, suite: str, architecture: str, mirror: str, packages: Sequence[str]) -> None:
    tool = shutil.which("mmdebstrap")
    if tool is None:
        raise NotFoundError(
            "mmdebstrap is not installed here, which makes the base",
            where=f"debian:{suite}",
            next_step="apt-get install mmdebstrap, or name an image as base",
        )
    command = [
        *(tool, "--quiet", "--variant=minbase", "--format=tar", f"--architectures={architecture}"),
        *(f"--include={','.join(packages)}", suite, str(path), mirror),
    ]
    env = {"SOURCE_DATE_EPOCH": str(MTIME_S)}
    try:
        run_tool(command, bound="debootstrap_s_max", seconds_max=DEBOOTSTRAP_S_MAX, env=env)
    except ToolFailed as error:
        raise UnavailableError(
            f"the base could not be made: {error.said}",
            where=f"debian:{suite} from {mirror}",
            next_step="see that the mirror can be reached and has the packages, or name an image as base",
        ) from error


@contextmanager
def _read_file(path: Path, offset: int) -> Iterator[Read]:
    with path.open("rb") as stream:
        stream.seek(offset)
        yield stream.read
