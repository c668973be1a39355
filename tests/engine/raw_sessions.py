"""A worker spoken to word by word, over links in memory: what a device would say, and what it need never have said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import msgspec
import torch

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision
from splitwise_llm.engine.machine import Machine, need_of
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Crossings, Plan
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.messages import (
    Begin,
    Begun,
    Close,
    Closed,
    Data,
    Failed,
    Halted,
    Header,
    Hello,
    Open,
    Opened,
    Welcome,
    pack,
    unpack,
)
from splitwise_llm.wire.sequence import Sequenced

H = TypeVar("H", bound=Header)
Play = Callable[..., None]
"""A scene, and options of its worker."""
NAMES = ("edge", "cloud", "third")
STREAM = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
"""A residual stream, (positions, d_model), as if a device had computed it."""


@dataclass
class Speaker:
    """The device's end of a link, which says what it is told to say."""

    raw: MemoryLink
    link: Sequenced = field(init=False)

    def __post_init__(self) -> None:
        self.link = Sequenced(self.raw)

    async def say(self, header: Header, payload: bytes = b"") -> None:
        await self.link.send(pack(header, payload))

    async def frame(self, within_s: float = 10.0) -> bytes | None:
        """The next frame; None: the worker closed the link."""
        return await asyncio.wait_for(self.link.receive(), within_s)

    async def hear(self, kind: type[H]) -> H:
        """The worker's next word, which must be of this kind."""
        return (await self.hear_all(kind))[0]

    async def hear_all(self, kind: type[H]) -> tuple[H, memoryview]:
        frame = await self.frame()
        assert frame is not None, "the worker closed the link"
        header, payload = unpack(frame)
        assert isinstance(header, kind), header
        return header, payload

    async def ask(self, header: Header, kind: type[H]) -> H:
        await self.say(header)
        return await self.hear(kind)

    async def is_silent(self, for_s: float = 0.05) -> bool:
        """Whether nothing comes for a while."""
        try:
            await self.frame(for_s)
        except TimeoutError:
            return True
        return False


@dataclass
class Lab:
    """A worker, and ways to talk to it."""

    worker: Worker
    checkpoint: Checkpoint

    @property
    def cut(self) -> Partition:
        return Partition.cut(self.checkpoint.architecture.spec, 2)

    def partition(self, text: str) -> Partition:
        return Partition.parse(text, self.checkpoint.architecture.spec, NAMES)

    def plan(self, partition: Partition) -> Plan:
        return plans.compile(Decision(partition), self.checkpoint.architecture.spec, 2)

    @asynccontextmanager
    async def link(self) -> AsyncIterator[Speaker]:
        near, far = memory_pair()
        task = asyncio.create_task(self._serve(far))
        yield Speaker(near)
        await near.close()
        await task

    async def _serve(self, far: Link) -> None:
        await self.worker.handle(far)
        await far.close()

    @asynccontextmanager
    async def session(self, **changes: object) -> AsyncIterator[tuple[Speaker, Opened]]:
        """A link with a session opened over it, and what the worker said to that."""
        async with self.link() as device:
            yield device, await self.opened(device, **changes)

    def hello(self) -> Hello:
        return Hello(messages.PROTOCOL_VERSION, self.checkpoint.fingerprint)

    def opening(self, **changes: object) -> Open:
        return msgspec.structs.replace(Open("s", 1, ["edge", "cloud"], 24, [], 0.0, 0, 1.0, 0, 0.0, 0), **changes)

    async def opened(self, device: Speaker, **changes: object) -> Opened:
        await device.ask(self.hello(), Welcome)
        return await device.ask(self.opening(**changes), Opened)

    async def refused(self, device: Speaker, **changes: object) -> Failed:
        """Why a session cannot be opened."""
        await device.ask(self.hello(), Welcome)
        failed = await device.ask(self.opening(**changes), Failed)
        assert failed.run == -1, "of the session"
        return failed

    def begin(self, run: int = 1, where: Partition | None = None, **changes: object) -> Begin:
        """Four ids are there, and six tokens may follow."""
        usual = Begin(run, (where or self.cut).to_bytes(), "fp32", 0, start=0, known=4, tokens=6)
        return msgspec.structs.replace(usual, **changes)

    async def begun(self, device: Speaker, run: int = 1, where: Partition | None = None, **changes: object) -> None:
        begun = await device.ask(self.begin(run, where, **changes), Begun)
        assert begun.run == run

    async def feed(self, device: Speaker, step: int, start: int, stop: int, run: int = 1) -> None:
        """The stream that crosses a cut behind layer 2, of some positions."""
        await device.say(*stream(step, start, stop, run))

    async def token(self, device: Speaker, step: int, run: int = 1) -> int:
        """The token of a step."""
        header, payload = await device.hear_all(Data)
        assert (header.kind, header.run, header.step) == ("token", run, step)
        return int.from_bytes(payload, "little")

    async def decode(self, device: Speaker, start: int, known: int, stop: int, run: int = 1) -> list[int]:
        """The tokens behind positions `known` - 1 to `stop` - 1, in a run that starts at `start`."""
        await self.feed(device, 0, start, known, run)
        tokens = [await self.token(device, 0, run)]
        for position in range(known, stop):
            await self.feed(device, position - known + 1, position, position + 1, run)
            tokens.append(await self.token(device, position - known + 1, run))
        return tokens

    @cached_property
    def expected(self) -> list[int]:
        """By position, the token that follows `STREAM` up to there, computed without any worker."""
        resident = Resident(self.checkpoint, Dtype.FP32, Weights.FULL, torch.device("cpu"))
        share = Share(resident, need_of(self.cut, 1), len(STREAM))
        with torch.inference_mode():
            x = share.run(STREAM, 4, 8, share.positions(0, len(STREAM)))
            return [int(share.logits(x[: n + 1]).argmax()) for n in range(len(STREAM))]

    def sent(self, halted: Halted) -> tuple[Crossings, ...]:
        """What the worker says that it has sent."""
        return tuple(Crossings(c.after, c.kind, c.src, c.dst, c.count, c.payload_bytes) for c in halted.crossed)

    async def check_serves(self) -> None:
        """A well-behaved session still works, and leaves nothing."""
        async with self.session(session="another") as (device, _):
            await self.begun(device)
            assert await self.decode(device, 0, 4, 6) == self.expected[3:6]
            await device.ask(Close(), Closed)


def stream(step: int, start: int, stop: int, run: int = 1) -> tuple[Data, bytes]:
    """A part of `STREAM`, as it crosses from the device behind stage 0."""
    header = Data(run, step, 0, "residual", 0, 1, 0, "fp32", stop - start, 64)
    return header, STREAM[start:stop].numpy().tobytes()


def held(said: Opened | Halted) -> dict[int, tuple[tuple[int, ...], int]]:
    """By half, the units and how many positions of them are cached."""
    return {one.half: (tuple(one.units), one.filled) for one in said.held}


def kept(said: Opened | Halted) -> dict[int, Sequence[tuple[int, int]]]:
    """By half, the positions of which the stream before it was kept."""
    return {one.half: one.spans for one in said.streams}


@contextmanager
def lab_with(checkpoint: Checkpoint, **options: object) -> Iterator[Lab]:
    """At most two sessions at a time."""
    with Machine(checkpoint) as machine:
        yield Lab(Worker(machine, **({"max_sessions": 2, "idle_s": 5} | options)), checkpoint)  # type: ignore[arg-type]


def play(checkpoint: Checkpoint, scene: Callable[[Lab], Awaitable[None]], **options: object) -> None:
    """A scene, after which the worker must serve as if nothing had been, and then hold nothing."""

    async def played() -> None:
        with lab_with(checkpoint, **options) as lab:
            await scene(lab)
            await lab.check_serves()
            await lab.worker.close()
            assert not lab.worker.machine._open, "what nobody needs is held on to"

    asyncio.run(played())
