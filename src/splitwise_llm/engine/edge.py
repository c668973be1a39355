"""The device's end, as a program uses it: a model, the workers it can reach, and generations across them.

`async with edge.generate(...) as generation: async for token in generation: ...` is the whole interface.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from splitwise_llm.cost import UNLIMITED, Host, Limits
from splitwise_llm.decision import MAX_DRAFT, Decision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.direct import DirectLinks
from splitwise_llm.engine.drafting import Compute, Draft, Drafter, Drafting, Lookup, Pace
from splitwise_llm.engine.generation import Device, Generation
from splitwise_llm.engine.hosted import KEPT_BYTES
from splitwise_llm.engine.journal import Entry, Journal, check, read_journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.peer import Connect
from splitwise_llm.engine.remembering import Memory
from splitwise_llm.engine.survey import Rates
from splitwise_llm.engine.walk import GREEDY, NO_LOSS, Choose, Request
from splitwise_llm.errors import RequestError, Unreachable
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.drafter import ModelDrafter
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Always, Policy, Tools, innermost
from splitwise_llm.partition import NAME, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.spec import DeviceSpec, Dtype, Kernels, Weights
from splitwise_llm.wire.codec import ElementLoss
from splitwise_llm.wire.faults import Injection
from splitwise_llm.wire.faulty import FaultyConnect
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.link import Link, TlsFiles
from splitwise_llm.wire.messages import PROTOCOL_VERSION
from splitwise_llm.wire.pacing import LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

EDGE = "edge"
PRIORITY = "priority"
"""A journal's option: who resumes asks for the same session."""


class Edge:
    """A device with a model and the names of the workers it can reach. Closing it closes its machine.

    `direct` gives, for a pair of workers with a link of their own, the address at which the first reaches
    the second, `turned` where the second would reach the first, should the first not get through;
    `rates` what links carry as far as one knows, by worker, or by two workers as in `cloud+third`.
    """

    def __init__(
        self,
        machine: Machine,
        workers: Sequence[str] = (),
        connect: Connect | None = None,
        direct: Mapping[tuple[str, str], str] | None = None,
        rates: Mapping[str, Rates] | None = None,
        turned: Mapping[tuple[str, str], str] | None = None,
    ) -> None:
        if EDGE in workers or len(set(workers)) != len(workers):
            raise RequestError(f"machine names must differ from each other and from '{EDGE}': {', '.join(workers)}")
        for name in workers:
            if not NAME.fullmatch(name):
                raise RequestError(f"{name!r} is no machine name: letters, digits, '_', '.' and '-', a letter first")
        self.machine = machine
        self.names = (EDGE, *workers)
        pairs = {(self._number(a), self._number(b)): address for (a, b), address in (direct or {}).items()}
        if any(a == b or (b, a) in pairs for a, b in pairs):
            raise RequestError("a direct link joins two different workers, and each pair is named once")
        tokenizer = Tokenizer(machine.checkpoint.directory)
        known = dict(self._rates(link, said, pairs) for link, said in (rates or {}).items())
        back = {(self._number(b), self._number(a)): address for (b, a), address in (turned or {}).items()}
        self._device = Device(
            machine, tokenizer, self.names, connect or _nowhere, DirectLinks(pairs, back), known,
            Memory() if len(workers) == 1 else None,
        )  # fmt: skip
        self._paces: dict[Draft, Pace] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine's compute thread, and what keeps the time of links."""
        self.machine.close()
        if isinstance(self._device.connect, LinkTo):
            self._device.connect.close()

    def _number(self, name: str) -> int:
        if name not in self.names[1:]:
            raise RequestError(f"unknown worker {name!r}; the workers are {', '.join(self.names[1:]) or 'none'}")
        return self.names.index(name)

    def _rates(self, link: str, said: Rates, direct: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], Rates]:
        """The pair of machines that a name stands for, lower number first, and the rates in that order."""
        first, plus, second = link.partition("+")
        if not plus:
            return (DEVICE, self._number(link)), said
        a, b = self._number(first), self._number(second)
        if not {(a, b), (b, a)} & set(direct):
            raise RequestError(f"rates of {link} were given, and there is no direct link between these two")
        return ((a, b), said) if a < b else ((b, a), replace(said, up=said.down, down=said.up))

    def partition(self, text: str) -> Partition:
        """Read a partition of this model over these machines. Raises PartitionError."""
        return Partition.parse(text, self.machine.spec, self.names)

    def generate(
        self,
        prompt: str | Sequence[int],
        policy: Policy | Decision | Partition | str = "all:edge",
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        loss: ElementLoss | None = None,
        choose: Choose | None = None,
        called: str = "",
        limits: Limits = UNLIMITED,
        tools: Tools | None = None,
        rules: RecoveryRules | None = None,
        journal: Path | None = None,
        options: Mapping[str, object] | None = None,
        draft: Draft | None = None,
        drafter: Drafter | None = None,
        priority: int = 0,
    ) -> Generation:
        """One generation, to be entered as a context and iterated. `policy` may be a partition or its text;
        `choose` replaces sampling, where the head is on the device.

        `called` is the policy's name in the record; `limits` what it must respect, `tools` what it may use (None:
        what loses nothing). `rules` say how long a lost worker is waited for and tried again; `journal` is a file that
        another process can go on from, with `options` for it. `draft` says who proposes tokens for several positions to
        be computed at a time; None: lookup in the text where a policy decides how much of it, else nobody. A `drafter`
        of one's own proposes instead, as many as the decision says each time, on the thread that asks.
        `priority` (0 to 3) is how often prompts get a turn where many sessions share a worker.

        Raises UserError now; entering it raises what opening the session meets.
        """
        ids = self._device.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        spec = self.machine.spec
        if any(not 0 <= token < spec.vocab_size for token in ids):
            raise RequestError(f"the prompt has token ids outside the model's vocabulary of {spec.vocab_size}")
        stops = self.machine.checkpoint.stop_ids if stop_ids is None else stop_ids
        request = Request(len(ids), max_new_tokens, frozenset(stops), sampling or GREEDY, loss or NO_LOSS, priority)
        request.check(spec.max_context)
        entry = Entry(
            session=uuid.uuid4().hex,  # whoever knows it may join, so it is not short
            fingerprint=self.machine.checkpoint.fingerprint,
            protocol=PROTOCOL_VERSION,
            prompt=tuple(ids),
            max_new_tokens=max_new_tokens,
            stop_ids=tuple(sorted(request.stop_ids)),
            sampling=request.sampling,
            loss=request.loss,
            dtype=self.machine.dtype,
            weights=self.machine.weights,
            options=dict(options or {}) | ({PRIORITY: priority} if priority else {}),
        )
        decides = self._policy(policy, draft)
        if drafter is not None:
            drafting: Drafting | None = Drafting(drafter, spec.vocab_size, Pace(least=MAX_DRAFT))
        else:
            drafting = self._drafting(decides, draft, request)
        kept = Boundaries(spec.d_model, KEPT_BYTES)
        memory = Journal.create(journal, entry, kept) if journal else Journal(entry, kept)
        return Generation(
            self._device,
            memory,
            decides,
            request,
            choose,
            called=called,
            limits=limits,
            tools=tools,
            rules=rules,
            drafting=drafting,
        )

    def resume(
        self,
        path: Path,
        policy: Policy | Decision | Partition | str = "all:edge",
        *,
        called: str = "",
        limits: Limits = UNLIMITED,
        tools: Tools | None = None,
        rules: RecoveryRules | None = None,
        draft: Draft | None = None,
    ) -> Generation:
        """Go on with the session of a journal whose process has died, in the same file; workers that still know it
        go on with what they hold. Raises JournalError, UserError."""
        saved = read_journal(path)
        check(saved, self.machine.checkpoint.fingerprint, PROTOCOL_VERSION)
        entry = saved.entry
        request = Request(
            len(entry.prompt), entry.max_new_tokens, frozenset(entry.stop_ids), entry.sampling, entry.loss,
            int(str(entry.options.get(PRIORITY, 0))),
        )  # fmt: skip
        decides = self._policy(policy, draft)
        drafting = self._drafting(decides, draft, request)
        journal = Journal.continue_from(saved, path, Boundaries(self.machine.spec.d_model, KEPT_BYTES))
        return Generation(
            self._device, journal, decides, request, None, called=called, limits=limits, tools=tools, rules=rules,
            drafting=drafting,
        )  # fmt: skip

    def _policy(self, policy: Policy | Decision | Partition | str, draft: Draft | None) -> Policy:
        if isinstance(policy, str):
            policy = self.partition(policy)
        if isinstance(policy, Partition):
            policy = Decision(policy, draft=draft.most if draft and draft.by != "off" else 0)
        return Always(policy) if isinstance(policy, Decision) else policy

    def _drafting(self, policy: Policy, draft: Draft | None, request: Request) -> Drafting | None:
        """Who proposes tokens for a session on this device; None: nobody. What was right in earlier texts is what is
        expected of the next. Raises ModelError, RequestError."""
        decided = innermost(policy)
        if draft is None and isinstance(decided, Always):
            draft = Draft(most=decided.decision.draft, is_free=False) if decided.decision.draft else None
        elif draft is None:
            draft = Draft()
        if draft is None or draft.by == "off":
            return None
        machine, capacity = self.machine, request.prompt_tokens + request.max_new_tokens
        pace = self._paces.setdefault(draft, Pace(least=0 if draft.is_free else 1))
        if draft.by == "ngram":
            return Drafting(Lookup(), machine.spec.vocab_size, pace, draft.most)
        checkpoint, weights, layers = machine.checkpoint, machine.weights, draft.layers or None
        if layers is None:
            checkpoint, weights = Checkpoint(locate(draft.by)), draft.weights
        drafter = ModelDrafter(
            checkpoint, machine.checkpoint, capacity, request.sampling, machine.dtype, weights, layers,
            Kernels.TORCH if machine.kernels is Kernels.TORCH else Kernels.AUTO,
        )  # fmt: skip
        compute = self._on_its_thread(drafter, weights)
        return Drafting(drafter, machine.spec.vocab_size, pace, draft.most, compute, drafter.spec, weights)

    def _on_its_thread(self, drafter: ModelDrafter, weights: Weights) -> Compute:
        """Runs a drafting model between the pieces of the large one; an emulated device takes its time for it, too."""

        async def compute(work: Callable[[], Sequence[int]]) -> Sequence[int]:
            made: list[int] = []

            def predicted(device: DeviceSpec) -> float:
                return len(made) * Host(device, self.machine.dtype, weights).model_s(
                    drafter.spec, 1, drafter.num_cached
                )

            def noted() -> Sequence[int]:
                made.extend(work())
                return made

            return (await self.machine.compute(noted, predicted)).value

        return compute


async def _nowhere(name: str) -> Link:
    raise Unreachable(f"no way to reach {name!r} was given")


class LinkTo:
    """How to reach workers over the network: their addresses, the certificates, and a shape to put around a link."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        *,
        tls: TlsFiles | None = None,
        shapes: Mapping[str, LinkShape] | None = None,
        faults: Mapping[str, Sequence[Injection]] | None = None,
    ) -> None:
        self.addresses, self._tls, self._shapes = dict(addresses), tls, dict(shapes or {})
        unknown = ({*self._shapes} | {*(faults or {})}) - set(self.addresses)
        if unknown:
            raise RequestError(f"a link was described to {min(unknown)!r}, which is no machine of this call")
        self._clocks: dict[str, LinkClock] = {}
        """One per shaped link: its trace and its outages go on while it is made anew."""
        self._open: dict[str, list[ShapedLink]] = {}
        """Of each shaped link, what generations side by side have open: together they get its rate once."""
        self._faults = FaultyConnect(self._dial, {name: Faults(one) for name, one in (faults or {}).items()})

    @property
    def rates(self) -> dict[str, Rates]:
        """What the shaped links carry on average."""
        return {name: Rates.of_shape(shape) for name, shape in self._shapes.items()}

    async def __call__(self, name: str) -> Link:
        return await self._faults(name) if self._faults.faults else await self._dial(name)

    async def _dial(self, name: str) -> Link:
        link = await dial(self.addresses[name], name=name, tls=self._tls)
        if name not in self._shapes:
            return link
        if name not in self._clocks:
            self._clocks[name] = LinkClock()
        others = [one for one in self._open.get(name, []) if not one.is_closed]
        shaped = ShapedLink(link, self._shapes[name], self._clocks[name], beside=others[0] if others else None)
        self._open[name] = [*others, shaped]
        return shaped

    def close(self) -> None:
        """End the clocks of shaped links."""
        for clock in self._clocks.values():
            clock.close()


def edge_with(
    model: str,
    workers: Mapping[str, str] | LinkTo,
    *,
    dtype: Dtype = Dtype.FP32,
    weights: Weights = Weights.FULL,
    threads: int = 1,
    memory_bytes: int | None = None,
    emulate: float | DeviceSpec | None = None,
    profile: DeviceSpec | None = None,
    kernels: Kernels = Kernels.TORCH,
    direct: Iterable[tuple[str, str]] = (),
    rates: Mapping[str, Rates] | None = None,
) -> Edge:
    """The device end of a model (`bundled`, a directory or a hub id) with workers at `host:port`, by name.

    `direct` names pairs of workers that reach each other, the second at the address given for it here, or else the
    first; `rates` come before those of the shapes.
    Close it, or use it as a context manager. Raises ModelError, RequestError.
    """
    reach = workers if isinstance(workers, LinkTo) else LinkTo(workers)
    checkpoint = Checkpoint(locate(model))
    machine = Machine(
        checkpoint, dtype=dtype, weights=weights, threads=threads, memory_bytes=memory_bytes, emulate=emulate,
        profile=profile, kernels=kernels,
    )  # fmt: skip
    named = tuple(direct)
    pairs = {(a, b): reach.addresses.get(b, "") for a, b in named}
    turned = {(b, a): reach.addresses.get(a, "") for a, b in named}
    return Edge(machine, tuple(reach.addresses), reach, pairs, reach.rates | dict(rates or {}), turned)
