"""Every policy decides for a running engine: on emulated machines its choice is executed, and says the same words."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forked import splitwise_text
from splitwise_llm.bench.processes import worker
from splitwise_llm.cli.choice import asked_policy
from splitwise_llm.cost import Floor, Limits, Load
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.greeting import Greeted
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.survey import ASSUMED, LOSSY, Rates, Survey
from splitwise_llm.engine.walk import Request
from splitwise_llm.engine.worker import Worker
from splitwise_llm.errors import ProtocolError, RequestError, SpecError, Unreachable
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.observation import Observation, Policy, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies import POLICIES, find_policy
from splitwise_llm.policies.chains import Flow
from splitwise_llm.policies.pipelines import EdgeShard
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.messages import Welcome, pack
from splitwise_llm.wire.sequence import Sequenced
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

PROMPT = "It was a bright morning, and the Prince said:"
SLOW = DeviceSpec("slow", 1e10, 8e8, 1e9, launch_s=2e-4, idle_w=1.0, decode_w=5.0, prefill_w=6.0)
"""About 32 ms per token of the bundled model; SLOWEST about 120, FAST about 9."""
SLOWEST = replace(SLOW, name="slowest", memory_bytes_per_s=2e8)
FAST = DeviceSpec("fast", 2e11, 4e9, 3e9, launch_s=2e-4, idle_w=20.0, decode_w=100.0, prefill_w=200.0, slots=8)
NEAR = LinkShape.parse("rtt=2ms rate=20mbit")
FOR_ONE_SESSION = [name for name in POLICIES if name != "edgeshard-throughput"]
Emulate = float | DeviceSpec | None


@dataclass(frozen=True)
class Stubborn:
    """A policy that decides what it likes."""

    text: str

    def decide(self, observation: Observation) -> Decision:
        return Decision(Partition.parse(self.text, observation.model, ("edge", "cloud")))


@dataclass
class Lab:
    """A device and one worker, `cloud`, in this process, behind a shaped link."""

    edge: Edge
    cloud: Worker

    async def observe(self, **changes: object) -> Observation:
        """What a policy would be shown."""
        return (await self.run(Stubborn("all:edge"), tokens=1, **changes))[1]

    async def run(
        self, policy: Policy | str, tokens: int = 5, **options: object
    ) -> tuple[RequestRecord, Observation, Decision]:
        """One generation, to its end."""
        generation = self.edge.generate(
            PROMPT,
            policy,
            max_new_tokens=tokens,
            stop_ids=(),
            **options,  # type: ignore[arg-type]
        )
        async with generation:
            async for _ in generation:
                pass
        return generation.record, generation.observation, generation.decision


@asynccontextmanager
async def lab(
    edge: Emulate = SLOW,
    cloud: Emulate = FAST,
    *,
    shape: LinkShape | None = NEAR,
    reachable: bool = True,
    profile: DeviceSpec | None = None,
    dtype: Dtype = Dtype.FP32,
    rates: dict[str, Rates] | None = None,
) -> AsyncIterator[Lab]:
    checkpoint = Checkpoint(locate("bundled"))
    serving: set[asyncio.Task[None]] = set()
    with ExitStack() as stack:
        serves = Worker(stack.enter_context(Machine(checkpoint, dtype=dtype, emulate=cloud)))
        device = stack.enter_context(Machine(checkpoint, dtype=dtype, emulate=edge, profile=profile))

        async def connect(name: str) -> Link:
            if not reachable:
                raise Unreachable(f"nobody answers for {name}; start `splitwise worker` there")
            near, far = memory_pair(("device", name))

            async def serve() -> None:
                await serves.handle(far)
                await far.close()

            task = asyncio.create_task(serve())
            serving.add(task)
            task.add_done_callback(serving.discard)
            return near if shape is None else ShapedLink(near, shape)

        believed = {"cloud": Rates.of_shape(shape)} if shape else {}
        yield Lab(Edge(device, ["cloud"], connect, rates=believed | (rates or {})), serves)
        await asyncio.gather(*serving)


@pytest.fixture(scope="module")
def alone() -> tuple[int, ...]:
    """What the model says without any policy."""

    async def play() -> tuple[int, ...]:
        async with lab(None, None) as one:
            return (await one.run("all:edge"))[0].token_ids

    return asyncio.run(play())


@pytest.mark.parametrize("name", FOR_ONE_SESSION)
def test_what_a_policy_chooses_is_executed_and_says_what_one_machine_says(name: str, alone: tuple[int, ...]) -> None:
    async def play() -> None:
        async with lab() as one:
            record, seen, decision = await one.run(find_policy(name), called=name)
        assert decision == find_policy(name).decide(seen)
        assert record.partition == decision.partition.text(("edge", "cloud"))
        assert (record.policy, record.token_ids) == (name, alone)
        assert record.predicted is not None
        # Emulated machines take what they are priced by; on a busy machine an echo, and all else, takes longer.
        rtt_s = record.predicted.links[0].rtt_s
        assert record.ttft_s > 0.95 * (record.predicted.ttft_s - rtt_s)
        assert record.tpot_s > 0.95 * (record.predicted.tpot_s - rtt_s)
        assert json.loads(record.to_json())["predicted"]["links"][0]["rates_from"] == "its shape"

    asyncio.run(play())


def test_policies_differ_in_what_they_choose_here() -> None:
    async def play() -> dict[str, str]:
        async with lab(SLOWEST) as one:
            seen = await one.observe()
        return {name: find_policy(name).decide(seen).partition.text(("edge", "cloud")) for name in FOR_ONE_SESSION}

    chosen = asyncio.run(play())
    expected = {
        "edge-only": "all:edge", "cloud-only": "all:cloud", "even-split": "edge[0:4] cloud[4:8]",
        "memory-proportional": "edge[0:2] cloud[2:8]", "neurosurgeon": "all:cloud", "exact": "all:cloud",
        "edgeshard-exact": "edge[0:1] cloud[1:8]",
    }  # fmt: skip
    assert {name: chosen[name] for name in expected} == expected


def test_a_floor_turns_the_choice_into_a_u_shape_that_keeps_it(alone: tuple[int, ...]) -> None:
    async def play() -> None:
        floor = Floor(2, 2)
        async with lab(SLOWEST) as one:
            for name in ("exact", "cloud-only"):
                record, _, decision = await one.run(find_policy(name), limits=Limits(floor))
                assert floor.holds(decision.partition)
                assert record.partition == "edge[0:2] cloud[2:6] edge[6:8]"
                assert record.token_ids == alone

    asyncio.run(play())


NEEDS_THE_WORKER = ("cloud-only", "even-split")
NEEDS_A_WORKER = "layer-splitting"


@pytest.mark.parametrize("name", [name for name in FOR_ONE_SESSION if name not in (*NEEDS_THE_WORKER, NEEDS_A_WORKER)])
def test_nobody_decides_for_a_machine_that_does_not_answer(name: str, alone: tuple[int, ...]) -> None:
    async def play() -> None:
        async with lab(reachable=False) as one:
            record, seen, _ = await one.run(find_policy(name), tokens=5 if name == "exact" else 1)
        assert record.partition == "all:edge"
        assert seen.limits.unreachable == {1}
        assert record.token_ids == alone[: len(record.token_ids)]
        assert record.predicted is not None
        assert record.predicted.links == (), "nothing is believed of a link to nobody"

    asyncio.run(play())


@pytest.mark.parametrize("name", NEEDS_THE_WORKER)
def test_who_cannot_do_without_a_machine_says_that_it_does_not_answer_and_why(name: str) -> None:
    async def play() -> None:
        async with lab(reachable=False) as one:
            with pytest.raises(RequestError, match=r"machine 1 \(cloud\) cannot be reached.*splitwise worker"):
                await one.run(find_policy(name))

    asyncio.run(play())


def test_layer_splitting_says_that_it_has_nobody_to_split_with() -> None:
    async def play() -> None:
        async with lab(reachable=False) as one:
            with pytest.raises(RequestError, match="needs a worker within reach"):
                await one.run(find_policy(NEEDS_A_WORKER))

    asyncio.run(play())


def test_a_policy_that_ignores_its_limits_is_stopped_before_anything_is_opened() -> None:
    async def play() -> None:
        async with lab(reachable=False) as one:
            with pytest.raises(Unreachable, match="nobody answers for cloud"):
                await one.run(Stubborn("all:cloud"))
        async with lab() as one:
            with pytest.raises(RequestError, match=r"the floor 1\+1 keeps"):
                await one.run(Stubborn("edge[0:4] cloud[4:8] head=edge"), limits=Limits(Floor(1, 1)))
            with pytest.raises(RequestError, match=r"the floor 1\+1 keeps"):
                await one.run("edge[0:4] cloud[4:8]", limits=Limits(Floor(1, 1)))

    asyncio.run(play())


def test_rules_need_no_figures_and_prices_name_the_machine_that_has_none() -> None:
    async def play() -> None:
        async with lab(None, FAST) as one:
            seen = await one.observe()
            assert seen.world is None
            with pytest.raises(RequestError, match=r"machine edge is not profiled.*--profile FILE or --emulate"):
                find_policy("neurosurgeon").decide(seen)
            with pytest.raises(RequestError, match="machine edge is not profiled"):
                find_policy("edgeshard-latency").decide(seen)
            for name, text in (("cloud-only", "all:cloud"), ("even-split", "edge[0:4] cloud[4:8]")):
                record, _, _ = await one.run(find_policy(name), tokens=1)
                assert (record.partition, record.predicted) == (text, None)
            assert find_policy("memory-proportional").decide(seen).partition.machines == (0, 1)
            assert find_policy("edge-only").decide(seen).partition.machines == (0,)

    asyncio.run(play())


def test_a_profile_gives_the_figures_of_a_machine_and_a_factor_stretches_them() -> None:
    async def play() -> None:
        async with lab(3.0, 2.0, profile=SLOW) as one:
            one.cloud.machine.profile = FAST
            seen = await one.observe()
        assert seen.world is not None
        device, cloud = seen.world.hosts
        assert (device.stretch, cloud.stretch) == (3.0, 2.0)
        assert device.device == replace(SLOW, name="edge", memory_bytes=device.device.memory_bytes)
        assert cloud.device == replace(FAST, name="cloud", memory_bytes=cloud.device.memory_bytes)
        assert cloud.device.memory_bytes == seen.machines[1].memory_bytes

    asyncio.run(play())
    with pytest.raises(RequestError, match="give a profile, or a device to emulate"):
        Machine(Checkpoint(locate("bundled")), profile=SLOW, emulate=FAST)


def test_other_sessions_on_a_worker_make_it_slower_for_this_one() -> None:
    async def play() -> None:
        async with lab(SLOWEST) as one:
            idle = await one.observe()
            generation = one.edge.generate(PROMPT, "all:cloud", max_new_tokens=40, stop_ids=())
            async with generation:
                busy = await one.observe()
        assert idle.loads == {}
        assert busy.world is not None
        assert busy.loads == {1: busy.world.load(1, 2, context=busy.job.mean_context)}
        assert 1.0 < busy.loads[1].slow < 1.5, "weights are read once for both"
        assert busy.loads[1].batch == 2
        assert find_policy("exact").decide(busy).partition.machines == (1,)
        crowded = replace(busy, loads={1: Load(slow=40.0, batch=40.0)})
        assert find_policy("exact").decide(crowded).partition.machines == (0,)

    asyncio.run(play())


@pytest.mark.parametrize(("dtype", "wire"), [(Dtype.FP32, WirePrecision.FP32), (Dtype.BF16, WirePrecision.BF16)])
def test_a_policy_may_lose_nothing_on_the_wire_unless_the_caller_allows_it(dtype: Dtype, wire: WirePrecision) -> None:
    async def play() -> None:
        limits = Limits(Floor(2, 2))
        async with lab(SLOWEST, dtype=dtype, shape=LinkShape.parse("rtt=2ms rate=8mbit")) as one:
            exact = find_policy("exact").decide(await one.observe(limits=limits))
            assert exact.wire is wire
            lossy = await one.observe(limits=limits, tools=Tools((wire, *LOSSY)))
            assert find_policy("exact").decide(lossy).wire is WirePrecision.INT4

    asyncio.run(play())


def test_rates_come_from_the_shape_or_the_caller_or_are_assumed_in_so_many_words(tmp_path: Path) -> None:
    async def believed(shape: LinkShape | None, **rates: Rates) -> tuple[float, float, str, float]:
        async with lab(shape=shape, rates=rates) as one:
            predicted = (await one.run(Stubborn("all:edge"), tokens=1))[0].predicted
        assert predicted is not None
        (link,) = predicted.links
        assert (link.first, link.second) == ("edge", "cloud")
        return link.up_bytes_per_s, link.down_bytes_per_s, link.rates_from, link.rtt_s

    trace = tmp_path / "walk.txt"
    trace.write_text("0 10\n1 30\n2 20\n")
    assert asyncio.run(believed(LinkShape.parse("rate=20mbit")))[:3] == (2.5e6, 2.5e6, "its shape")
    assert asyncio.run(believed(LinkShape.parse(f"up={trace}")))[:2] == (pytest.approx(2.5e6), ASSUMED.down)
    assert asyncio.run(believed(None))[:3] == (1.25e8, 1.25e8, "assumed: 1 Gbit/s")
    assert asyncio.run(believed(None, cloud=Rates.parse("up=8mbit down=16mbit")))[:3] == (1e6, 2e6, "given")
    assert 0.029 < asyncio.run(believed(LinkShape.parse("rtt=30ms")))[3] < 0.1, "an echo takes longer on a busy machine"
    assert Rates.of_shape(LinkShape.parse("rate=20mbit outage=10s/3s")).up == pytest.approx(0.7 * 2.5e6)
    for text in ("fast", "up=1mbit", "up=1mbit down=x", ""):
        with pytest.raises(SpecError):
            Rates.parse(text)


def test_a_link_between_workers_has_its_own_rates_and_the_longer_way_from_here() -> None:
    given = {"b": Rates.parse("8mbit"), "b+a": Rates.parse("up=8mbit down=16mbit")}
    with Machine(Checkpoint(locate("bundled")), emulate=SLOW) as machine:
        with pytest.raises(RequestError, match="no direct link between"):
            Edge(machine, ["a", "b"], rates=given)
        rates = Edge(machine, ["a", "b"], direct={("b", "a"): "here"}, rates=given)._device.rates
        welcome = Welcome(messages.PROTOCOL_VERSION, "", "fp32", "full", 10**9, 10**6, 1, "")
        greeted = {1: Greeted(welcome, FAST, 0.01), 2: Greeted(welcome, FAST, 0.03)}
        survey = Survey(machine, ("edge", "a", "b"), greeted, rates, frozenset({(1, 2)}))
        world = survey.observe(Request(4, 4)).world
    assert world is not None
    assert world.links[1, 2] == LinkSpec(0.03, up_bytes_per_s=2e6, down_bytes_per_s=1e6)
    assert world.links[0, 1] == LinkSpec(0.01, ASSUMED.up, ASSUMED.down)
    assert world.links[0, 2] == LinkSpec(0.03, 1e6, 1e6)


@pytest.mark.parametrize(
    "figures",
    [
        {"name": "x", "flop_per_s": -1.0, "memory_bytes_per_s": 1e9, "memory_bytes": 1e9},
        {"name": "x", "flop_per_s": 1e9, "memory_bytes_per_s": 1e9},
        {"name": "x", "flop_per_s": 1e9, "memory_bytes_per_s": 1e9, "memory_bytes": 1e9, "magic": 1},
        {"name": "x", "flop_per_s": "fast", "memory_bytes_per_s": 1e9, "memory_bytes": 1e9},
    ],
)
def test_a_worker_that_gives_impossible_figures_of_itself_is_not_believed(figures: dict[str, object]) -> None:
    async def play() -> None:
        async with lab() as one:

            async def connect(name: str) -> Link:
                near, raw = memory_pair(("device", name))
                far = Sequenced(raw)
                mine = one.edge.machine.checkpoint.fingerprint
                usual = Welcome(messages.PROTOCOL_VERSION, mine, "fp32", "full", 10**9, 10**6, 1, "")
                await far.send(pack(msgspec.structs.replace(usual, figures=figures)))
                return near

            edge = Edge(one.edge.machine, ["cloud"], connect)
            with pytest.raises(ProtocolError, match="figures of itself"):
                async with edge.generate(PROMPT, "all:cloud", max_new_tokens=1):
                    pass

    asyncio.run(play())


# As a person runs it


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Device files of the two machines."""
    made = {}
    for device in (SLOW, FAST):
        figures = {name: getattr(device, name) for name in device.__slots__ if getattr(device, name) is not None}
        path = tmp_path_factory.mktemp("devices") / f"{device.name}.json"
        path.write_text(json.dumps(figures))
        made[device.name] = str(path)
    return made


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return splitwise_text("generate", *arguments)


@pytest.mark.usefixtures("forks")
def test_a_policy_from_the_command_line_with_its_reasons_until_the_worker_is_killed(
    files: dict[str, str], tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    with worker("bundled", "--emulate", files["fast"]) as process:
        usual = ("--machine", f"cloud={process.address}", "--link", "cloud=rtt=2ms rate=20mbit", "-n", "4", PROMPT)
        usual += ("--emulate", files["slow"], "--policy", "router", "--json", str(record))
        done = generate(*usual, "--explain")
        assert done.returncode == 0, done.stderr
        said = json.loads(record.read_text())
        assert (said["policy"], said["partition"]) == ("router", "all:cloud")
        assert said["predicted"]["ttft_s"] > 0
        for words in ("router chooses all:cloud", "predicted: TTFT", "J on the device", "fastest other partition"):
            assert words in done.stderr, done.stderr
        assert "measured: TTFT" in done.stderr
        assert "up 20 Mbit/s" in done.stderr
        process.kill()
        later = generate(*usual)
    assert later.returncode == 0, later.stderr
    assert "going on without cloud" in later.stderr
    assert json.loads(record.read_text())["partition"] == "all:edge"
    assert later.stdout == done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "neurosurgon"}, "did you mean 'neurosurgeon'"),
        ({"name": "exact", "partition": "all:edge"}, "exclude each other"),
        ({"name": "exact", "wire": WirePrecision.INT8}, "--allow-lossy"),
        ({"name": "exact", "chunk": 16}, "leave out --wire and --chunk"),
        ({"allow_lossy": True}, "is for a --policy"),
        ({"low_level": "exact"}, "name one, as in --policy drift"),
        ({"name": "drift", "low_level": "quick"}, "it is exact or learned"),
        ({"name": "router", "low_level": "exact"}, "--low-level is for --policy"),
        ({"name": "drift", "low_level": "learned", "machines": 2}, "name more workers"),
    ],
)
def test_options_that_exclude_each_other_are_refused_with_the_remedy(options: dict[str, Any], says: str) -> None:
    none: dict[str, Any] = {"name": "", "partition": "", "wire": None, "chunk": None, "allow_lossy": False}
    with pytest.raises(RequestError, match=says):
        asked_policy(**(none | options))


def test_a_throughput_plan_for_one_prompt_is_refused_with_what_to_give_instead() -> None:
    done = generate("--policy", "edgeshard-throughput", PROMPT)
    assert done.returncode == 2, done.stderr
    assert "give more with --prompts FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_caches_of_all_sequences_in_flight_count_in_edgeshards_programs() -> None:
    for name in ("edgeshard-throughput", "edgeshard-exact"):
        policy = asked_policy(name, "", None, None, False, in_flight=6)
        # Dies when choice.py says `Flow(1, 1)` for `Flow(1, in_flight or 1)`.
        assert isinstance(policy, EdgeShard)
        assert policy.flow == Flow(1, 6)
