"""API keys."""

import pytest

from snowdrop.domain.errors import UnauthorisedError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.tenancy.keys import KEY_PREFIX, authenticate, bearer, key_sha256, make_key

TEAM = TenantId("team")


def test_a_key_is_known_by_its_hash_alone() -> None:
    secret, digest = make_key()
    assert secret.startswith(KEY_PREFIX)
    assert secret not in digest
    assert key_sha256(secret) == digest
    assert make_key()[0] != secret
    assert authenticate(digest, {digest: TEAM}, required=True) == TEAM


def test_no_key_is_the_default_tenant_unless_one_is_required() -> None:
    assert authenticate(None, {}, required=False) == DEFAULT_TENANT
    with pytest.raises(UnauthorisedError, match="required"):
        authenticate(None, {}, required=True)


@pytest.mark.parametrize("required", [True, False])
def test_a_wrong_key_is_refused_even_where_none_is_needed(required: bool) -> None:
    with pytest.raises(UnauthorisedError, match="unknown"):
        authenticate("nobody's", {key_sha256("sd_x"): TEAM}, required=required)


def test_the_header_is_read_without_regard_to_case_and_space() -> None:
    assert bearer(None) is None
    assert bearer("Bearer sd_x") == "sd_x"
    assert bearer("bearer   sd_x ") == "sd_x"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic dXNlcg==", "sd_x"])
def test_another_scheme_is_refused_and_never_shown(header: str) -> None:
    with pytest.raises(UnauthorisedError) as caught:
        bearer(header)
    assert "dXNlcg" not in str(caught.value)
