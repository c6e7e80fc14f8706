"""Services that are no class of the SDK: a command that serves HTTP, an ASGI app; and who speaks OpenAI's dialect.

A command says in its words where it is to listen and where its model lies, by placeholders that the replica fills
in. Braces that hold no plain name are left as they are, so that JSON may be an argument.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from snowdrop.domain.errors import InvalidInputError

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""What of the dialect a deployment may speak, by the paths of its own at which it does."""

PLACEHOLDERS = {
    "model": "directory of the service's only model",
    "model:NAME": "directory of the model of that name or parameter",
    "port": "TCP port on loopback to listen on",
    "host": "address to listen on, 127.0.0.1",
    "socket": "path of the unix socket to listen on, instead of a port",
    "python": "the replica's Python interpreter",
    "code": "directory of the service's code",
    "deployment": "name of the deployment, which clients give as `model`",
}
STOP_S_MAX = 600.0
WORDS_MAX = 1_000
WORD_CHARS_MAX = 32_768

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?::([A-Za-z0-9][A-Za-z0-9_.-]*))?\}")


class CommandSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A server as a command line, run inside the sandbox.

    It listens where `{port}` or `{socket}` tells it, or always at `port` if that is given. `ready` is a path that
    answers 2xx once it can serve; empty: a connection is enough. `stop_s_max` is how long it may take to end after
    SIGTERM, seconds.
    """

    argv: tuple[str, ...]
    port: int | None = None
    ready: str = "/health"
    stop_s_max: float = 10.0

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0]:
            raise _refused("the command is empty", "command", 'give its words, as in ["vllm", "serve", "{model}"]')
        if len(self.argv) > WORDS_MAX or any(len(word) > WORD_CHARS_MAX or "\0" in word for word in self.argv):
            raise _refused(
                "the command is too long or holds a NUL",
                "command",
                f"at most {WORDS_MAX} words of {WORD_CHARS_MAX} characters",
            )
        names = {name for name, _ in self.placeholders()}
        unknown = sorted(names - {each.partition(":")[0] for each in PLACEHOLDERS})
        if unknown:
            known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
            raise _refused(
                f"the command has the unknown placeholder {{{unknown[0]}}}", "command", f"known: {known}"
            )
        if "port" in names and "socket" in names:
            raise _refused("the command is given both a port and a socket", "command", "use {port} or {socket}")
        if self.port is not None and ("socket" in names or not 1 <= self.port <= 65_535):
            raise _refused(
                f"the port {self.port} does not fit", "command.port", "1 to 65535, and not beside {socket}"
            )
        if self.port is None and not names & {"port", "socket"}:
            raise _refused(
                "the command is not told where to listen",
                "command",
                'put {port} or {socket} among its words, as in "--port", "{port}", or say `port=` if it is fixed',
            )
        if self.ready and not self.ready.startswith("/"):
            raise _refused(f"the path {self.ready!r} has no leading slash", "command.ready", f'"/{self.ready}"')
        if not 0 < self.stop_s_max <= STOP_S_MAX:
            raise _refused(
                "stop_s_max is out of range", "command.stop_s_max", f"more than 0, at most {STOP_S_MAX:g}"
            )

    def placeholders(self) -> frozenset[tuple[str, str]]:
        """(name, argument) of every placeholder; the argument is empty where there is none."""
        found = (match for word in self.argv for match in _PLACEHOLDER.finditer(word))
        return frozenset((match[1], match[2] or "") for match in found)

    @property
    def wants_socket(self) -> bool:
        return ("socket", "") in self.placeholders()

    def filled(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """The words with placeholders replaced; `values` by what stands between the braces."""
        return tuple(_PLACEHOLDER.sub(lambda match: values[match[0][1:-1]], word) for word in self.argv)


class AsgiSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An ASGI app. With `is_factory` it is made in the startup stage by a function of the models.

    `lifespan`: "auto" lets an app do without; "on" wants one; "off" sends it nothing.
    """

    is_factory: bool = False
    lifespan: Literal["auto", "on", "off"] = "auto"


def check_openai_paths(paths: tuple[str, ...]) -> None:
    """Raises InvalidInputError for a path that is not of the dialect."""
    for path in paths:
        if path not in OPENAI_PATHS:
            raise _refused(
                f"{path!r} is no path of OpenAI's dialect", "openai", f"known: {', '.join(OPENAI_PATHS)}"
            )


def check_models(command: CommandSpec, names: tuple[tuple[str, str], ...]) -> None:
    """Raises InvalidInputError if the command wants a model that the service does not have.

    `names` are (name, parameter) of the service's models.
    """
    known = {each for pair in names for each in pair}
    for name, argument in sorted(command.placeholders()):
        if name == "model" and not argument and len(names) != 1:
            raise _refused(
                f"the command has {{model}}, and the service has {len(names)} models",
                "command",
                "name one: {model:NAME}" if names else 'give it one: model=sd.Model("name")',
            )
        if name == "model" and argument and argument not in known:
            raise _refused(
                f"the command has {{model:{argument}}}, and the service has no such model",
                "command",
                f"it has: {', '.join(sorted(known)) or 'none'}",
            )


def _refused(message: str, where: str, step: str) -> InvalidInputError:
    return InvalidInputError(message, where=where, next_step=step)
