"""Debian's registry, filled by skopeo, as the source of a push."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from content_helpers import noise
from image_helpers import Layout, Pushed, member, names, tar
from origin_servers import free_port, serving
from snowdrop.domain.errors import NotFoundError
from snowdrop.image.oci import Platform, parse_reference
from snowdrop.image.opening import ReachOptions
from snowdrop.image.registry import RegistrySource

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("docker-registry", "skopeo")),
        reason="scripts/setup.sh installs docker-registry and skopeo",
    ),
]
CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
log: {{level: error}}
"""


def test_an_image_of_a_real_registry_is_pulled_in_parts(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "config.yml").write_text(CONFIG.format(root=tmp_path / "registry", port=port))
    (tmp_path / "docker.json").write_text('{"auths": {}}')
    data = noise(5 << 20, seed=9)
    layout = Layout(
        [(tar(member("app", data=data)), "gzip"), (tar(member("top", data=b"1")), "zstd")], {"Env": ["A=b"]}
    )
    layout.write(tmp_path / "layout")
    reach = ReachOptions(platform=Platform(), docker_config=tmp_path / "docker.json")
    with serving(["docker-registry", "serve", str(tmp_path / "config.yml")], port, dict(os.environ)):
        host = f"127.0.0.1:{port}"
        copied = subprocess.run(
            ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false",
             f"oci:{tmp_path}/layout:latest", f"docker://{host}/team/app:1"],
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert copied.returncode == 0, copied.stderr.decode()
        source = RegistrySource(parse_reference(f"{host}/team/app:1"), reach)
        layer = source.image().layers[0]
        with source.read_layer(layer, layer.size - 5) as read:  # a range
            assert read(1 << 20) == layout.blobs[layer.digest][-5:]
        made = Pushed(source, tmp_path / "w", fetch=True)
        assert names(made.tree().entries) == [b"", b"app", b"top"]
        assert made.data()[: len(data)] == data
        assert made.tree().config.env == ("A=b",)
        missing = RegistrySource(parse_reference(f"{host}/team/app:2"), reach)
        with pytest.raises(NotFoundError):
            missing.image()
        missing.close()
