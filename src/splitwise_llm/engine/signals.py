"""The words between a session and the recovery of one of its workers: events go in, actions come out. Nouns only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from splitwise_llm.engine.transitions import On

# -- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """Any frame arrived. `link`: the number of the attempt that made the link (0: the first); None: the present one."""

    link: int | None = None
    kind: ClassVar[On] = On.HEARD


@dataclass(frozen=True, slots=True)
class Expect:
    """An answer is awaited that is predicted to take `step_s` (s, network included)."""

    step_s: float
    kind: ClassVar[On] = On.EXPECT


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is awaited."""

    kind: ClassVar[On] = On.IDLE


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; say so at `next_deadline_s`."""


@dataclass(frozen=True, slots=True)
class Died:
    """The link broke, or its frames are damaged. `link` as in `Heard`."""

    reason: str
    link: int | None = None
    kind: ClassVar[On] = On.DIED


@dataclass(frozen=True, slots=True)
class Reached:
    """Attempt number `attempt` dialled and was greeted; its link has the same number from now on."""

    attempt: int
    kind: ClassVar[On] = On.REACHED


@dataclass(frozen=True, slots=True)
class Unreached:
    """The attempt failed, or (while resyncing) the worker takes no session now; a full one says when to come back."""

    attempt: int
    reason: str
    retry_after_s: float | None = None
    kind: ClassVar[On] = On.UNREACHED


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Greeted, but with another model or version: no use in trying again."""

    attempt: int
    reason: str
    kind: ClassVar[On] = On.MISMATCH


@dataclass(frozen=True, slots=True)
class Resumed:
    """The session can go on there. `held`: nothing had to be rebuilt. `link` as in `Heard`."""

    held: bool
    link: int | None = None
    kind: ClassVar[On] = On.RESUMED


@dataclass(frozen=True, slots=True)
class Wait:
    """The policy's answer to a fault: patience ends `wait_s` after it (`backoff.wait_s`; infinite: never)."""

    wait_s: float
    kind: ClassVar[On] = On.WAIT


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The generation goes on without it."""

    where: str = "elsewhere"
    kind: ClassVar[On] = On.ELSEWHERE


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The session wants it no more."""

    reason: str = "the session is over"
    kind: ClassVar[On] = On.GIVE_UP


Word: TypeAlias = Heard | Expect | Idle | Died | Reached | Unreached | Mismatch | Resumed | Wait | Elsewhere | GiveUp
Event: TypeAlias = Word | Tick


# -- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    """Send a ping; its answer counts as any frame."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """Break off link or attempt number `link`: whatever it is now, or still becomes, is closed."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial and greet; answer with `Reached`, `Unreached` or `Mismatch` of this number."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Attach:
    """Ask over link number `link` what the worker still holds of the session; answer with `Resumed`."""

    link: int


@dataclass(frozen=True, slots=True)
class AskPolicy:
    """An epoch of the controller; a fault is answered with `Wait`, and `Elsewhere` when it moves."""

    why: Literal["fault", "return", "gone"]


@dataclass(frozen=True, slots=True)
class PatienceOver:
    """The policy waited as long as it wanted to: go on elsewhere if that is possible at all."""


@dataclass(frozen=True, slots=True)
class Tell:
    """A line for the records. `kind`: suspect, alive, lost, unreached, attempt, back, patience, elsewhere or gone."""

    kind: str
    text: str


Action: TypeAlias = Ping | HangUp | Dial | Attach | AskPolicy | PatienceOver | Tell
