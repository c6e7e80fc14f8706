"""Methods that take a whole body as one value, as those of OpenAI's dialect do."""

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.signature import Signature


def check_whole_body(signature: Signature) -> None:
    """Raises InvalidInputError unless the method has one parameter, which a whole body can be decoded into."""
    if len(signature.parameters) != 1:
        raise InvalidInputError(
            f"{signature.where} must take the request as its only parameter",
            where=signature.where,
            next_step="write `def chat(self, request: sd.ChatRequest) -> Iterator[str]`, or `request: dict`",
        )
