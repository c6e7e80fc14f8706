"""How an origin is reached, apart from its URL. No secrets: those come from the environment or a file."""

from __future__ import annotations

import msgspec


class OriginOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`endpoint` is the service's URL if it is not the cloud's own; `region` is S3's.

    `credentials_file` is a file in the cloud's own form, `ca_file` more certificates to trust (PEM).
    `anonymous` asks without credentials.
    """

    endpoint: str = ""
    region: str = ""
    credentials_file: str = ""
    ca_file: str = ""
    anonymous: bool = False
