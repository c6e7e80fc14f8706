"""What a service asks for: the descriptors that the SDK makes, the platform stores and the replica obeys.

The SDK's decorators build these and attach them to the user's class; `snowdrop deploy` stores them with the
revision; the replica reads them back. They live here because the SDK and the replica share them and neither
may import the other.
"""

from typing import Any, Literal

import msgspec

from snowdrop.domain.batching import Batch as Batch  # noqa: PLC0414 -- part of what a service says
from snowdrop.domain.ids import parse_name
from snowdrop.domain.require import require
from snowdrop.domain.rollout import RolloutSpec
from snowdrop.domain.scale import Scale as Scale  # noqa: PLC0414 -- part of what a service says
from snowdrop.domain.scale import Schedule as Schedule  # noqa: PLC0414
from snowdrop.domain.secret import check_names
from snowdrop.domain.servers import OPENAI_PATHS, AsgiSpec, CommandSpec, check_models, check_openai_paths
from snowdrop.domain.volume import Volume, check_volumes

SERVICE_ATTRIBUTE = "__snowdrop_service__"
"""Class attribute under which the decorator leaves the ServiceSpec."""
STAGE_ATTRIBUTE = "__snowdrop_stage__"
"""Function attribute that marks a startup, endpoint or shutdown method."""

CONCURRENCY_MAX = 10_000
PRIORITY_MAX = 9
WARM_IMPORTS_MAX = 32


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how many requests may wait for a slot, and in which order.

    `request_s_max` starts when the turn comes. `order` is that among requests of one priority: as they came, or
    fair between callers. A caller is a key, or, if `fair_by` says so, whom the header `snowdrop-caller` names (for
    a backend that calls for many). A request may ask for a priority within `priority_min` and `priority_max`;
    without one it gets `priority`. Each step counts as if it had come `priority_lead_s` earlier. A stream that
    waits is told how it stands after `progress_first_s` (None: never), then every `progress_every_s`.
    """

    length_max: int = 1_000
    wait_s_max: float = 600.0
    request_s_max: float = 3_600.0
    order: Literal["fifo", "fair"] = "fifo"
    fair_by: Literal["key", "caller"] = "key"
    priority: int = 0
    priority_min: int = 0
    priority_max: int = 0
    priority_lead_s: float = 60.0
    progress_first_s: float | None = 1.0
    progress_every_s: float = 2.0

    def __post_init__(self) -> None:
        require(1 <= self.length_max <= 1_000_000, "queue.length_max", "1 to 1,000,000")
        require(0 < self.wait_s_max <= 86_400, "queue.wait_s_max", "more than 0, at most 86,400 s")
        require(0 < self.request_s_max <= 86_400, "queue.request_s_max", "more than 0, at most 86,400 s")
        require(
            -PRIORITY_MAX <= self.priority_min <= self.priority <= self.priority_max <= PRIORITY_MAX,
            "queue.priority",
            f"-{PRIORITY_MAX} <= priority_min <= priority <= priority_max <= {PRIORITY_MAX}",
        )
        require(0 <= self.priority_lead_s <= 86_400, "queue.priority_lead_s", "0 to 86,400 s")
        require(
            self.progress_first_s is None or 0 <= self.progress_first_s <= 600,
            "queue.progress_first_s",
            "0 to 600 s, or None",
        )
        require(0.1 <= self.progress_every_s <= 600, "queue.progress_every_s", "0.1 to 600 s")


class ResourceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Hard limits of one replica. `cpus` may be a fraction; memory counts tmp files as well."""

    memory_bytes_max: int = 4 << 30
    cpus: float = 1.0
    pids_max: int = 512
    tmp_bytes_max: int = 1 << 30

    def __post_init__(self) -> None:
        require(self.memory_bytes_max >= 64 << 20, "resources.memory_bytes_max", "at least 64 MiB")
        require(0 < self.cpus <= 1024, "resources.cpus", "more than 0, at most 1024")
        require(16 <= self.pids_max <= 100_000, "resources.pids_max", "16 to 100,000")
        require(self.tmp_bytes_max >= 1 << 20, "resources.tmp_bytes_max", "at least 1 MiB")


class Model(msgspec.Struct, frozen=True):
    """A pushed model, by name; `param` is the startup parameter it is handed to (set by the decorator).

    Of a `lazy` one only those tensors are brought to the node that `startup` asks for, as slices need.
    """

    name: str
    param: str = "model"
    lazy: bool = False


class ImageCopy(msgspec.Struct, frozen=True, kw_only=True):
    """A file or folder below the service's folder, and its absolute path in the image."""

    source: str
    target: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """The environment a service runs in. Each method gives a new one.

    What `requirements` name is checked against the node's own environment at deploy time, and a missing one is
    refused with its name. `snowdrop image build` makes an image of it, under the `name` if there is one: on `base`
    (`debian:SUITE`, or an image as `image push` takes it), the packages for the `python` of the base (as "3.11"),
    resolved at `index_url` (uv's default if empty), then the `copies`.
    """

    requirements: tuple[str, ...] = ()
    name: str = ""
    base: str = "debian:bookworm"
    python: str = "3.11"
    index_url: str = ""
    apt_packages: tuple[str, ...] = ()
    copies: tuple[ImageCopy, ...] = ()

    @classmethod
    def from_requirements(
        cls,
        path: str,
        *,
        name: str = "",
        base: str = "debian:bookworm",
        python: str = "3.11",
        index_url: str = "",
    ) -> "Image":
        """An image from a requirements file, read when the service is deployed (relative to its folder)."""
        return cls(requirements=(f"-r {path}",), name=name, base=base, python=python, index_url=index_url)

    @classmethod
    def from_pyproject(
        cls,
        path: str = "pyproject.toml",
        *,
        extras: tuple[str, ...] = (),
        name: str = "",
        base: str = "debian:bookworm",
        python: str = "3.11",
        index_url: str = "",
    ) -> "Image":
        """An image with the dependencies of a project and of its `extras`; the project itself is to be copied."""
        entry = f"--pyproject {path}" + (f"[{','.join(extras)}]" if extras else "")
        return cls(requirements=(entry,), name=name, base=base, python=python, index_url=index_url)

    @classmethod
    def from_packages(cls, *packages: str) -> "Image":
        """An image from requirement specifiers, as in `Image.from_packages("torch>=2.4")`."""
        return cls(requirements=packages)

    def apt(self, *packages: str) -> "Image":
        """With Debian packages (`NAME` or `NAME=VERSION`) in its base, which must be a `debian:SUITE`."""
        return msgspec.structs.replace(self, apt_packages=(*self.apt_packages, *packages))

    def copy(self, source: str, target: str) -> "Image":
        """With a file or folder of the service's folder at the absolute path `target`."""
        return msgspec.structs.replace(self, copies=(*self.copies, ImageCopy(source=source, target=target)))


class EndpointSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One method that answers requests. Schemas are JSON Schema objects (draft 2020-12).

    With `batch` its method is called for several requests at once; the schemas are those of a single one.
    """

    path: str
    method_name: str
    doc: str = ""
    stream: Literal["no", "sse", "chunked"] = "no"
    is_async: bool = False
    input_schema: dict[str, Any] = msgspec.field(default_factory=dict)
    output_schema: dict[str, Any] = msgspec.field(default_factory=dict)
    components: dict[str, Any] = msgspec.field(default_factory=dict)
    batch: Batch | None = None


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a service's code says about itself. `entry` is `module:Class` once the code is packed.

    A service is a class with `endpoints`, or a `command`, or an `asgi` app, whose entry is `module:variable`.
    `openai` names the paths of OpenAI's dialect that a command or an app serves.
    `secrets` names secrets by environment variable, or by `file:NAME`. `park_s_max` is how long a request may wait
    while the revision is crash-looping; with 0 it is refused at once.
    `calls` are the deployments of its tenant that it may call; all others are refused.
    Its replicas are forks of a parent that has done `warm_imports`, where there is one and `warm` is not off.
    """

    class_name: str
    entry: str = ""
    models: tuple[Model, ...] = ()
    image: Image = Image()
    concurrency: int = 1
    scale: Scale = Scale()
    queue: QueueSpec = QueueSpec()
    resources: ResourceSpec = ResourceSpec()
    accelerator: tuple[str, ...] = ("cpu",)
    startup_s_max: float = 600.0
    import_s_max: float = 120.0
    drain_s_max: float = 3_600.0
    rollout: RolloutSpec = RolloutSpec()
    park_s_max: float = 60.0
    secrets: dict[str, str] = msgspec.field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    startup_name: str | None = None
    shutdown_name: str | None = None
    endpoints: tuple[EndpointSpec, ...] = ()
    command: CommandSpec | None = None
    asgi: AsgiSpec | None = None
    openai: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    warm: bool = True
    warm_imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_kind()
        require(
            1 <= self.concurrency <= CONCURRENCY_MAX,
            "concurrency",
            f"1 to {CONCURRENCY_MAX}, got {self.concurrency}",
        )
        require(0 < self.startup_s_max <= 86_400, "startup_s_max", "more than 0, at most 86,400 s")
        require(0 < self.import_s_max <= 3_600, "import_s_max", "more than 0, at most 3,600 s")
        require(0 < self.drain_s_max <= 86_400, "drain_s_max", "more than 0, at most 86,400 s")
        check_names(self.secrets)
        check_volumes(self.volumes)
        require(0 <= self.park_s_max <= 86_400, "park_s_max", "0 to 86,400 s")
        require(len(self.accelerator) > 0, "accelerator", 'at least one, for example ["cpu"]')
        require(len(self.warm_imports) <= WARM_IMPORTS_MAX, "warm_imports", f"at most {WARM_IMPORTS_MAX}")
        for module in self.warm_imports:
            named = all(part.isidentifier() for part in module.split("."))
            require(named, "warm_imports", f"names of modules, not {module!r}")
        for name in self.calls:
            parse_name(name, what="deployment name in `calls`")

    def _check_kind(self) -> None:
        check_openai_paths(self.openai)
        if self.command is not None:
            check_models(self.command, tuple((model.name, model.param) for model in self.models))
        kinds = [self.command is not None, self.asgi is not None, bool(self.endpoints)]
        require(sum(kinds) <= 1, "service", "endpoints, a command or an ASGI app, one of them")

    @property
    def openai_paths(self) -> tuple[str, ...]:
        """What the service speaks of OpenAI's dialect: as it says, or by the names of its endpoints."""
        named = {endpoint.path for endpoint in self.endpoints}
        return tuple(path for path in OPENAI_PATHS if path in self.openai or path in named)
