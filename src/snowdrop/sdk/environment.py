"""What an environment lacks of a service's requirements."""

from importlib import metadata

import msgspec
from packaging.requirements import InvalidRequirement, Requirement

from snowdrop.domain.errors import InvalidInputError


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """A requirement that this interpreter's environment does not meet; `found` is the version there, if any."""

    requirement: str
    found: str | None = None


def check_requirements(requirements: tuple[str, ...]) -> list[Missing]:
    """Requirements that are absent or of another version here, in the order given.

    Those whose marker excludes this platform are met. What a named extra asks for is checked one level deep.
    Raises InvalidInputError for a text that is no requirement.
    """
    missing: dict[str, Missing] = {}
    for text in requirements:
        for lack in _lacks(_parse(text)):
            missing.setdefault(lack.requirement, lack)
    return list(missing.values())


def _parse(text: str) -> Requirement:
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise InvalidInputError(
            f"{text!r} is no requirement", where=text, next_step="write it as in `torch>=2.4`"
        ) from error


def _lacks(requirement: Requirement) -> list[Missing]:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return []
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return [Missing(requirement=str(requirement))]
    if not _fits(requirement, distribution):
        return [Missing(requirement=str(requirement), found=distribution.version)]
    return [lack for extra in sorted(requirement.extras) for lack in _extra_lacks(extra, distribution)]


def _extra_lacks(extra: str, distribution: metadata.Distribution) -> list[Missing]:
    lacks = []
    for text in distribution.requires or ():
        needed = Requirement(text)
        marker = needed.marker
        if marker is None or marker.evaluate() or not marker.evaluate({"extra": extra}):
            continue
        try:
            present = metadata.distribution(needed.name)
        except metadata.PackageNotFoundError:
            lacks.append(Missing(requirement=f"{needed.name}{needed.specifier}"))
            continue
        if not _fits(needed, present):
            lacks.append(Missing(requirement=f"{needed.name}{needed.specifier}", found=present.version))
    return lacks


def _fits(requirement: Requirement, distribution: metadata.Distribution) -> bool:
    # What is installed was chosen by somebody, so a pre-release counts.
    return requirement.specifier.contains(distribution.version, prereleases=True)
