"""The signature of a batched method, as its clients see it: what is a list in the method is one value for them."""

import collections.abc
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from snowdrop.domain.batching import Batch
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.signature import Parameter, Signature, read_signature

_LISTS = (list, collections.abc.Sequence)
_UNIONS = (typing.Union, types.UnionType)


def client_signature(function: Callable[..., object], where: str, batch: Batch | None) -> Signature:
    """What clients see of an endpoint: of a batched one, the signature for one request.

    Raises as `read_signature` does.
    """
    return read_signature(function, where, None if batch is None else item_signature)


def item_signature(signature: Signature) -> Signature:
    """The signature for one request of a method that takes `list[T]` for each parameter and returns `list[R]`.

    Exceptions in `list[R | Exception]` are no part of the answer. Raises InvalidInputError for a method that
    cannot be called for several requests at once.
    """
    where = signature.where
    if signature.stream != "no":
        raise InvalidInputError(
            f"{where} streams, and a stream can't be shared by a batch",
            where=where,
            next_step="drop `batch`, or return a list with one whole answer for each request",
        )
    if not signature.parameters:
        raise InvalidInputError(
            f"{where} is batched but takes nothing",
            where=where,
            next_step="give it a parameter, as in `texts: list[str]`",
        )
    parameters = tuple(_item_parameter(each, where) for each in signature.parameters)
    return msgspec.structs.replace(
        signature, parameters=parameters, returns=_item_result(signature.returns, where)
    )


def _item_parameter(parameter: Parameter, where: str) -> Parameter:
    place = f"{where}({parameter.name})"
    item = _list_item(parameter.annotation)
    if item is None:
        raise InvalidInputError(
            f"the parameter `{parameter.name}` of the batched {where} is no list",
            where=place,
            next_step="a batched method takes the values of all its requests: write `list[T]` where one has `T`",
        )
    if not parameter.required:
        raise InvalidInputError(
            f"the parameter `{parameter.name}` of the batched {where} has a default, which fits a batch alone",
            where=place,
            next_step="drop it; for optional fields take one `list[Request]`, where Request is a dataclass or a "
            "msgspec.Struct with defaults",
        )
    return Parameter(name=parameter.name, annotation=item, default=msgspec.NODEFAULT)


def _item_result(annotation: Any, where: str) -> Any:
    item = _list_item(annotation)
    if item is None:
        raise InvalidInputError(
            f"the batched {where} does not return a list",
            where=f"{where} -> {annotation}",
            next_step="return one result for each request, in their order: `-> list[R]`, or `list[R | Exception]`",
        )
    if typing.get_origin(item) in _UNIONS:
        answers = [each for each in typing.get_args(item) if not _is_exception(each)]
        item = typing.Union[tuple(answers)] if answers else None  # noqa: UP007 -- from a computed tuple
    if _is_exception(item):
        raise InvalidInputError(
            f"{where} returns nothing but exceptions", where=where, next_step="write `list[R | Exception]`"
        )
    return item


def _list_item(annotation: Any) -> Any:
    """What a list type is a list of; None for anything else."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    items = typing.get_args(annotation)
    return items[0] if typing.get_origin(annotation) in _LISTS and items else None


def _is_exception(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseException)
