"""Small worlds to price plans in: shipped machines on named links, and generated ones. It expects no figure."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from splitwise_llm.cost import Drafter, Form, Host, Job, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec, Weights, find_device, find_model
from strategies import model_specs

LINKS = {
    "lan": LinkSpec.parse("rtt=0.5ms up=1gbit down=1gbit"),
    "wifi": LinkSpec.parse("rtt=3ms up=100mbit down=100mbit"),
    "mec": LinkSpec.parse("rtt=5ms up=100mbit down=100mbit"),
    "wan": LinkSpec.parse("rtt=20ms up=50mbit down=50mbit"),
    "cell": LinkSpec.parse("rtt=50ms up=5mbit down=5mbit"),
}
SMALL = ModelSpec("llama", 8, 64, 8, 8, 16, 256, 100, 4096, 3, False)
CHAT = Job(128, 128)
FP16 = WirePrecision.FP16

model = cache(find_model)
shipped = cache(find_device)


def box(**figures: float) -> DeviceSpec:
    """A machine of round figures: nothing takes a launch, a message, or a watt unless it is said."""
    known = {"flop_per_s": 1e12, "memory_bytes_per_s": 1e10, "memory_bytes": 1e15}
    return DeviceSpec(name="box", **{**known, **figures})  # type: ignore[arg-type]


def world(spec: ModelSpec, *hosts: Host | DeviceSpec, link: LinkSpec = LINKS["wan"], **other: Drafter) -> World:
    """Machines on equal links to the first."""
    machines = tuple(host if isinstance(host, Host) else Host(host) for host in hosts)
    return World(spec, machines, {(0, m): link for m in range(1, len(machines))}, **other)  # type: ignore[arg-type]


def edge_and_cloud(edge: str, cloud: str, name: str = "llama-2-7b", link: str = "wan") -> World:
    """A device that keeps weights in int4 and a server that keeps them in fp16."""
    return world(model(name), Host(shipped(edge), weights=Weights.INT4), Host(shipped(cloud)), link=LINKS[link])


def on(spec: ModelSpec, machine: int, chunk: int | None = None) -> Decision:
    """Everything on one machine."""
    return Decision(Partition.all_on(spec, machine), FP16, chunk)


def only(world: World, **places: float) -> Form:
    """Conditions under which nothing takes time but what is named: `slow`, `rtt` and `inverse` for all machines
    and links at once."""
    x, basis = world.basis.form({}), world.basis
    for machine in range(basis.num_machines):
        x[basis.slow(machine)] = x[basis.share(machine)] = places.get("slow", 0.0)
    for a, b in basis.pairs:
        x[basis.rtt(a, b)] = places.get("rtt", 0.0)
        x[basis.inverse(a, b)] = x[basis.inverse(b, a)] = places.get("inverse", 0.0)
    return x


@st.composite
def devices(draw: st.DrawFn, slots: int | None = None) -> DeviceSpec:
    """Machines from a slow board to a fast card."""
    low, high = 0.0, 20.0
    idle_w, pue = draw(st.floats(low, high)), draw(st.floats(1, 2))
    return box(
        flop_per_s=draw(st.floats(1e9, 1e13)),
        memory_bytes_per_s=draw(st.floats(1e8, 1e12)),
        launch_s=draw(st.floats(0, 1e-3)),
        message_s=draw(st.floats(0, 1e-3)),
        idle_w=idle_w,
        decode_w=idle_w + draw(st.floats(low, high)),
        prefill_w=idle_w + draw(st.floats(low, high)),
        radio_w=draw(st.floats(0, 2)),
        pue=pue,
        usd_per_hour=draw(st.floats(0, 4)),
        slots=draw(st.sampled_from([1, 8])) if slots is None else slots,
    )


@st.composite
def links(draw: st.DrawFn) -> LinkSpec:
    """Links from a bad phone's to a rack's."""
    rate = st.floats(1e4, 1e9)
    return LinkSpec(draw(st.floats(0, 0.2)), draw(rate), draw(rate))


@st.composite
def worlds(draw: st.DrawFn, machines: int = 3, spec: ModelSpec | None = None) -> World:
    """A device and workers of any speed on any links; the workers may have a link of their own."""
    hosts = tuple(
        Host(draw(devices(1 if n == 0 else None)), weights=draw(st.sampled_from(Weights))) for n in range(machines)
    )
    pairs = [(0, m) for m in range(1, machines)]
    if machines > 2 and draw(st.booleans()):
        pairs.append((1, 2))
    return World(spec or draw(model_specs()), hosts, {pair: draw(links()) for pair in pairs})


@st.composite
def jobs(draw: st.DrawFn, tokens: int = 40) -> Job:
    return Job(draw(st.integers(1, tokens)), draw(st.integers(1, tokens)))


@st.composite
def serial_partitions(draw: st.DrawFn, spec: ModelSpec, machines: int = 3) -> Partition:
    """Each half on one machine, embedding and head anywhere."""
    owner = st.integers(0, machines - 1)
    ends = sorted(draw(st.lists(st.integers(0, 2 * spec.num_layers), max_size=4)))
    spans = [(draw(owner), end / 2) for end in ends]
    whole = Partition.of_spans(spec, [*spans, (draw(owner), spec.num_layers)])
    return Partition(whole.layers, draw(owner), draw(owner))
