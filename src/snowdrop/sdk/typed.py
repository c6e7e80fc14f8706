"""`sd.ref("embed", Embed)`: the endpoints of a service class, or a Protocol of one, as methods of a reference."""

import inspect
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cached_property
from typing import Any

import msgspec

from snowdrop.domain.batched import client_signature
from snowdrop.domain.batching import Batch
from snowdrop.domain.calling import OutgoingCall
from snowdrop.domain.errors import CallFailedError, InvalidInputError
from snowdrop.domain.ids import parse_name
from snowdrop.domain.servers import OPENAI_PATHS
from snowdrop.domain.service import STAGE_ATTRIBUTE
from snowdrop.domain.signature import Signature, decode_hook
from snowdrop.sdk.ref import EVENT_STREAM, blocking, blocking_items, fetch, items, make_call

BATCH_AT_ONCE_MAX = 64
"""Requests under way at a time for one call of a batched method."""


class TypedRef:
    """Has one attribute for each endpoint of `service`; everything else raises AttributeError."""

    def __init__(self, name: str, service: type) -> None:
        self._snowdrop_name = parse_name(name, what="deployment name")
        self._snowdrop_service = service
        self._snowdrop_calls = {
            method.__name__: BoundCall(name, service, method, path, batch)
            for method, path, batch in _endpoints(service)
        }
        if not self._snowdrop_calls:
            raise InvalidInputError(
                f"{service.__name__} has no endpoint to call",
                where=f"ref({name!r}, {service.__name__})",
                next_step='mark its methods with `@sd.endpoint("/path")`',
            )

    def __getattr__(self, name: str) -> "BoundCall":
        try:
            return typing.cast("BoundCall", self.__dict__["_snowdrop_calls"][name])
        except KeyError:
            service = self.__dict__.get("_snowdrop_service", TypedRef)
            raise AttributeError(f"{service.__name__} has no endpoint method {name!r}") from None

    def __repr__(self) -> str:
        return f"sd.ref({self._snowdrop_name!r}, {self._snowdrop_service.__name__})"


def _endpoints(service: type) -> Iterator[tuple[Callable[..., object], str, Batch | None]]:
    """Methods with their paths. In a Protocol, one without a mark answers at `/NAME`."""
    is_protocol = getattr(service, "_is_protocol", False)
    for name, value in inspect.getmembers(service, inspect.isfunction):
        mark = getattr(value, STAGE_ATTRIBUTE, None)
        if mark is not None and mark[0] == "endpoint":
            yield value, mark[1], mark[2] if len(mark) > 2 else None
        elif is_protocol and mark is None and not name.startswith("_"):
            yield value, f"/{name}", None


class BoundCall:
    """One endpoint's method of another deployment. Called as the class declares it."""

    def __init__(
        self, deployment: str, service: type, method: Callable[..., object], path: str, batch: Batch | None
    ) -> None:
        self._deployment = deployment
        self._method = method
        self._path = path
        self._batch = batch
        self._where = f"{service.__name__}.{method.__name__}"

    def __repr__(self) -> str:
        return f"<{self._where} of {self._deployment!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A coroutine, an iterator or, of a plain method, the answer itself, waited for in this thread."""
        is_async = self._signature.on_loop
        if self._signature.stream != "no":
            call = self._call(self._bind(args, kwargs), accept=EVENT_STREAM)
            return items(call, self._decode) if is_async else blocking_items(call, self._decode)
        if is_async:
            return self.on_loop(*args, **kwargs)
        return blocking(lambda: self.on_loop(*args, **kwargs), self._call({}))

    async def on_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The answer, awaited, whether the method is `async` or not."""
        if self._signature.stream != "no":
            return [item async for item in self._items(args, kwargs)]
        given = self._bind(args, kwargs)
        if self._batch is None:
            return await fetch(self._call(given), self._decode)
        return await self._each(given)

    def _items(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncIterator[Any]:
        return items(self._call(self._bind(args, kwargs), accept=EVENT_STREAM), self._decode)

    async def _each(self, given: dict[str, Any]) -> list[Any]:
        """A batched method takes lists: a request for each, which the other side puts together again."""
        from snowdrop.sdk.fanout import gather  # noqa: PLC0415 -- it knows this class

        lengths = {len(values) for values in given.values()}
        if len(lengths) != 1:
            raise InvalidInputError(
                f"the lists for the batched {self._where} differ in length",
                where=f"call to {self._deployment}{self._path}",
                next_step="give each parameter one value for each request",
            )
        calls = [
            fetch(self._call({name: values[place] for name, values in given.items()}), self._decode)
            for place in range(lengths.pop())
        ]
        if not self._takes_errors:
            return await gather(*calls, at_once_max=BATCH_AT_ONCE_MAX)
        results = await gather(*calls, at_once_max=BATCH_AT_ONCE_MAX, return_errors=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, CallFailedError):
                raise result
        return list(results)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(self._method).bind(None, *args, **kwargs)
        self_name = next(iter(bound.arguments))
        return {name: value for name, value in bound.arguments.items() if name != self_name}

    def _call(self, given: dict[str, Any], *, accept: str = "") -> OutgoingCall:
        headers = {"accept": accept} if accept else None
        # Where OpenAI's dialect is spoken, the method's only parameter is the whole body.
        body = next(iter(given.values()), {}) if self._path in OPENAI_PATHS else given
        return make_call(self._deployment, self._path, body, headers=headers)

    @cached_property
    def _signature(self) -> Signature:
        return client_signature(self._method, self._where, self._batch)

    @cached_property
    def _takes_errors(self) -> bool:
        """Whether a batched method's list may hold exceptions, by its annotation."""
        returned = typing.get_type_hints(self._method)["return"]
        return any(
            isinstance(each, type) and issubclass(each, Exception)
            for item in typing.get_args(returned)
            for each in typing.get_args(item)
        )

    @cached_property
    def _decode(self) -> Callable[[bytes], Any]:
        return msgspec.json.Decoder(self._signature.returns, dec_hook=decode_hook).decode
