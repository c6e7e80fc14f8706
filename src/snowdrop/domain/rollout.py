"""A rollout: how traffic goes from one revision of a deployment to the next, and how far it has come."""

import re
from enum import StrEnum

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.require import require

STEPS_MAX = 20
_STEP = re.compile(
    r"(?P<percent>\d{1,3}(\.\d+)?)%?(:(?P<time>hold|(?P<number>\d+(\.\d+)?)(?P<unit>s|m|h)?))?(:(?P<requests>\d+))?"
)
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3_600.0}
STEP_S_DEFAULT = 60.0


class RolloutStep(msgspec.Struct, frozen=True, kw_only=True):
    """The new revision gets `weight` of the traffic for at least `s` seconds and `requests_min` answers.

    A step with `hold` lasts until somebody promotes; with weight 0 the new revision is then a preview, which
    only requests that name it reach.
    """

    weight: float
    s: float = STEP_S_DEFAULT
    requests_min: int = 0
    hold: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.weight < 1, "rollout.steps.weight", f"0 <= weight < 1, got {self.weight:g}")
        require(self.weight > 0 or self.hold, "rollout.steps.weight", "0 only together with hold")
        require(0 <= self.s <= 604_800, "rollout.steps.s", f"0 to 604,800 s, got {self.s:g}")
        require(0 <= self.requests_min <= 10**9, "rollout.steps.requests_min", "0 to 1,000,000,000")


class RolloutSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a service wants its new revisions rolled out. No steps: all traffic at once, when it is ready.

    The new revision is judged once it has `samples_min` answers: its error rate may be `error_rate_more_max` above
    that of the old one, and one in ten answers may come later than `latency_ratio_max` times what 95 % of
    the old one's answers took (0: latency is not watched). `failures_max` starts in a row may fail. After the
    shift it is watched for `prove_s` seconds, in which `keep_warm` replicas of the old one stay.
    """

    steps: tuple[RolloutStep, ...] = ()
    samples_min: int = 20
    error_rate_more_max: float = 0.02
    latency_ratio_max: float = 3.0
    failures_max: int = 2
    start_s_max: float = 3_600.0
    prove_s: float = 60.0
    keep_warm: int = 0

    def __post_init__(self) -> None:
        weights = [step.weight for step in self.steps]
        require(len(weights) <= STEPS_MAX, "rollout.steps", f"at most {STEPS_MAX}")
        require(weights == sorted(weights), "rollout.steps", "weights that do not fall")
        require(1 <= self.samples_min <= 10**6, "rollout.samples_min", "1 to 1,000,000")
        require(0 <= self.error_rate_more_max <= 1, "rollout.error_rate_more_max", "0 to 1")
        require(
            self.latency_ratio_max == 0 or 1 <= self.latency_ratio_max <= 1_000,
            "rollout.latency_ratio_max",
            "1 to 1,000, or 0 for not watched",
        )
        require(1 <= self.failures_max <= 100, "rollout.failures_max", "1 to 100")
        require(0 < self.start_s_max <= 604_800, "rollout.start_s_max", "more than 0, at most 604,800 s")
        require(0 <= self.prove_s <= 604_800, "rollout.prove_s", "0 to 604,800 s")
        require(0 <= self.keep_warm <= 1_000, "rollout.keep_warm", "0 to 1,000")


class RolloutPhase(StrEnum):
    """Where a rollout is; the last four are ends."""

    STARTING = "starting"
    SHIFTING = "shifting"
    PROVING = "proving"
    DONE = "done"
    ROLLED_BACK = "rolled-back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of one revision: how many, how many of them failed, and a histogram of their times to first byte."""

    done: int = 0
    failed: int = 0
    latency: tuple[int, ...] = ()


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout, stored with its deployment. Times are unix ns; `step_unix_ns` is 0 while no time counts.

    In SHIFTING, `step` counts the spec's steps; equal to their number, full traffic is being prepared. `before`
    is what each gateway had counted of the candidate when the step began. Gateways count on while control is
    away, so the step's answers are the difference, whoever asks for it.
    """

    candidate: RevisionId
    stable: RevisionId
    spec: RolloutSpec
    began_unix_ns: int
    phase: RolloutPhase = RolloutPhase.STARTING
    step: int = 0
    step_unix_ns: int = 0
    weight: float = 0.0
    paused: bool = False
    reason: str = ""
    before: dict[str, Sample] = msgspec.field(default_factory=dict)
    ended_unix_ns: int = 0


def parse_steps(text: str) -> tuple[RolloutStep, ...]:
    """`5%:10m,25%:10m:500,50%:hold` as steps: percent, time (or hold), least number of answers."""
    steps = []
    for word in text.split(","):
        found = _STEP.fullmatch(word.strip())
        if found is None:
            raise InvalidInputError(
                f"{word.strip()!r} is no canary step",
                where="--canary",
                next_step="write PERCENT[:TIME][:REQUESTS], as in 5%:10m,25%:10m:500,50%:hold",
            )
        hold = found["time"] == "hold"
        seconds = STEP_S_DEFAULT
        if found["number"]:
            seconds = float(found["number"]) * _UNIT_S[found["unit"] or "s"]
        steps.append(
            RolloutStep(
                weight=float(found["percent"]) / 100,
                s=0.0 if hold else seconds,
                requests_min=int(found["requests"] or 0),
                hold=hold,
            )
        )
    return tuple(steps)
