"""Message encoding: MessagePack of tagged msgspec structs, decoded against the union a peer may send.

Every connection opens with a Hello carrying PROTOCOL_VERSION; another version is refused at once, with both
numbers in the error, instead of failing later in a strange way.
"""

from typing import Any, Generic, TypeVar

import msgspec

from snowdrop.domain.errors import ProtocolError

PROTOCOL_VERSION = 3
FRAME_BYTES_MAX = 16 << 20

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the class name is the tag."""


class Codec(Generic[T]):
    """Encodes any message, decodes only those of the union `T`."""

    def __init__(self, union: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def encode(self, message: Message) -> bytes:
        """The message's bytes; raises ProtocolError if it is too large, or holds what has no encoding."""
        try:
            data = self._encoder.encode(message)
        except (UnicodeEncodeError, OverflowError) as error:
            raise ProtocolError(f"message {type(message).__name__}: {error}", where="wire") from error
        if len(data) > FRAME_BYTES_MAX:
            raise ProtocolError(
                f"message {type(message).__name__} has {len(data)} bytes",
                where=f"frame_bytes_max={FRAME_BYTES_MAX}",
            )
        return data

    def decode(self, data: bytes) -> T:
        """The message in `data`; raises ProtocolError if it is none of the union's."""
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise ProtocolError(
                f"undecodable message: {error}", where="wire", next_step="do all processes run one version?"
            ) from error


def check_version(theirs: int, *, peer: str) -> None:
    """Raises ProtocolError unless the peer speaks our version."""
    if theirs != PROTOCOL_VERSION:
        raise ProtocolError(
            f"{peer} speaks protocol {theirs}, this process {PROTOCOL_VERSION}",
            where="hello",
            next_step="run one version everywhere: `snowdrop down`, then `snowdrop up`",
        )
