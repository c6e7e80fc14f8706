"""The check that descriptors make of their fields."""

from snowdrop.domain.errors import InvalidInputError


def require(ok: bool, where: str, rule: str) -> None:
    """Raises InvalidInputError that names the field and what is allowed."""
    if not ok:
        raise InvalidInputError(f"{where} is out of range", where=where, next_step=f"allowed: {rule}")
