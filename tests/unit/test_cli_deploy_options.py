"""What `deploy` adds to what the code says."""

import pytest

from platform_helpers import service
from snowdrop.cli.deploy import _with_options, only_in_the_image
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.rollout import RolloutSpec, RolloutStep
from snowdrop.domain.service import Image


def test_canary_and_environment_come_beside_what_the_code_says() -> None:
    spec = service(env={"A": "1", "B": "2"}, rollout=RolloutSpec(prove_s=5.0))
    changed = _with_options(spec, "10%:1m", ["B=3", "C=x=y"], preview=False)
    assert changed.env == {"A": "1", "B": "3", "C": "x=y"}
    assert changed.rollout == RolloutSpec(steps=(RolloutStep(weight=0.1, s=60.0),), prove_s=5.0)
    assert _with_options(spec, None, [], preview=False) == spec


def test_a_preview_is_a_step_without_traffic_that_is_held() -> None:
    (step,) = _with_options(service(), None, [], preview=True).rollout.steps
    assert (step.weight, step.hold) == (0.0, True)


@pytest.mark.parametrize(
    ("canary", "env", "preview"), [("10%", [], True), (None, ["A"], False), (None, ["1A=x"], False)]
)
def test_what_cannot_be_is_refused(canary: str | None, env: list[str], preview: bool) -> None:
    with pytest.raises(InvalidInputError):
        _with_options(service(), canary, env, preview=preview)


def test_what_a_replica_will_not_find_of_its_image_is_named() -> None:
    image = Image.from_packages("torch").copy("data", "/srv/data").apt("ffmpeg")
    assert only_in_the_image(service(image=image)) == "/srv/data, Debian's ffmpeg"
    assert only_in_the_image(service(image=Image.from_packages("torch"))) == ""
