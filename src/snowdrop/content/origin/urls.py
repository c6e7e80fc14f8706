"""Where to GET an object: a URL that the store has signed, kept until it is about to expire, or a plain one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from datetime import timedelta
from urllib.parse import quote

import obstore
from obstore.exceptions import BaseError
from obstore.store import HTTPStore

from snowdrop.content.origin.exchange import UnusableError
from snowdrop.content.origin.head import GarbledError
from snowdrop.content.origin.port import place
from snowdrop.content.origin.stores import OpenStore, one_line
from snowdrop.content.origin.target import Located, Target, parse_target
from snowdrop.domain.errors import InvalidInputError

SIGNED_S = 3_600
USED_S_MAX = 2_700.0
"""A signature is renewed so long before it ends that no read in progress meets its end."""
SIGNED_KEPT_MAX = 4_096


class PlainUrls:
    """Objects that are read without a signature, perhaps with an Authorization header."""

    renewable = False

    def __init__(self, opened: OpenStore, origin: str) -> None:
        self._opened = opened
        self._origin = origin

    def locate(self, key: str, *, renewed: bool = False) -> Located:
        del renewed
        try:
            return Located(parse_target(f"{self._opened.base_url}/{quote(key)}"), self._opened.authorization)
        except GarbledError as error:
            raise InvalidInputError(f"{error}", where=place(self._origin, key)) from error


class SignedUrls:
    """Objects of a private store. Raises UnusableError where the store cannot sign."""

    renewable = True

    def __init__(self, opened: OpenStore) -> None:
        self._store = opened.store
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Target]] = OrderedDict()

    def locate(self, key: str, *, renewed: bool = False) -> Located:
        with self._lock:
            at_s, target = self._kept.get(key, (0.0, None))
        if target is not None and not renewed and time.monotonic() - at_s < USED_S_MAX:
            return Located(target)
        target = self._sign(key)
        with self._lock:
            self._kept[key] = (time.monotonic(), target)
            self._kept.move_to_end(key)
            while len(self._kept) > SIGNED_KEPT_MAX:
                self._kept.popitem(last=False)
        return Located(target)

    def _sign(self, key: str) -> Target:
        assert not isinstance(self._store, HTTPStore)
        try:
            return parse_target(obstore.sign(self._store, "GET", key, timedelta(seconds=SIGNED_S)))
        except (BaseError, ValueError, GarbledError) as error:
            raise UnusableError(f"it cannot sign: {one_line(error)}") from error
