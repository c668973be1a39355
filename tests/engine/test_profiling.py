"""What a machine is measured to do adds up to what it does; links and meters say what is there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.cost.measured import Measured
from splitwise_llm.engine import worker
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.meters import Gauge, Rapl, find_meter
from splitwise_llm.engine.probing import probe
from splitwise_llm.engine.profiling import BATCHES, FEW_ROWS, Grid, Profiler, _Timed, shares_measured
from splitwise_llm.engine.roofline import Peaks, device_figures, watts
from splitwise_llm.engine.worker import Worker
from splitwise_llm.errors import LinkDied, PeerMismatch, ProtocolError, RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.partition import Part
from splitwise_llm.spec import DeviceSpec, LinkSpec
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.messages import Hello, Open, Ping, Pong, Welcome, pack, unpack
from splitwise_llm.wire.sequence import Sequenced
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

GRID = Grid(((32, 32), (32, 16)), ((32, 32),))


async def measured(directory: Path) -> tuple[Measured, float]:
    """The units of a model, and the fastest real decode step beside them (s)."""
    async with in_process(directory, ("cloud",)) as edge:
        async with Profiler(edge.machine, GRID) as profiler:
            await profiler.round()
            profiler.forget()
            await profiler.round()
            await profiler.messages(edge, "cloud")
            units = profiler.table()
        async with edge.generate(list(range(32)), "all:edge", max_new_tokens=24, stop_ids=()) as generation:
            async for _ in generation:
                pass
    steps = generation.record.machines[0].intervals[1:]
    return units, min(one.stop_s - one.start_s for one in steps)


def test_units_add_up_to_a_step(tmp_path: Path) -> None:
    units, step_s = asyncio.run(measured(locate("bundled")))
    spec = units.model
    halves_s = sum(units.half_s(part, n, 1, 41, False) for part, n in ((Part.ATTENTION, 4), (Part.FFN, 8)))
    said = spec.num_layers * halves_s + units.head_s(1, False) + units.stage_s(1, False)
    assert step_s / 3 < said < 6 * step_s  # loosely: a neighbour may have the processor
    assert {half.units for half in units.halves if half.part is Part.FFN} == {8, 4, 1}
    assert {half.rows for half in units.halves} == {1, *FEW_ROWS, 16, 32}
    assert [point.batch for point in units.batches] == list(BATCHES)
    assert len(units.message) > 1
    assert 0 < units.token_s < step_s
    (tmp_path / "units.json").write_text(units.to_json())
    assert Measured.from_file(tmp_path / "units.json", spec) == units


# Dies when engine/profiling.py says `self.halves[kind::2])` for `self.halves[kind + 2 :: 2] or self.halves[kind::2])`.
def test_a_machine_wakes_once_a_stage_however_many_halves_follow() -> None:
    timed = _Timed((5.0, 2.5, 1.0, 2.0, 1.5, 2.0, 0.5, 2.0), 1, 3.0, 20.0)
    assert timed.awake == (1.0, 2.0, 1.0, 2.0, 1.5, 2.0, 0.5, 2.0)
    assert timed.woke_s == pytest.approx(4.5)
    lonely = _Timed((5.0, 2.5), 1, 3.0, 20.0)
    assert lonely.awake == lonely.halves
    assert lonely.woke_s == 0


def test_what_a_profile_writes_is_a_device_file(tmp_path: Path) -> None:
    async def play() -> dict[str, object]:
        units, _ = await measured(locate("bundled"))
        with Machine(Checkpoint(locate("bundled"))) as machine:
            return device_figures("here", machine, units, Peaks(1e9, 1e9), 1e8, None)

    path = tmp_path / "here.json"
    path.write_text(json.dumps(asyncio.run(play())))
    device = DeviceSpec.from_file(path)
    assert device.name == "here"
    assert device.flop_per_s >= 1e9
    assert 0 < device.memory_efficiency <= 1
    assert "decode_w" not in json.loads(path.read_text())


def test_a_model_with_one_group_is_measured_whole_only_once(tiny: Callable[[str], Path]) -> None:
    spec = Checkpoint(tiny("llama-gqa-tied")).architecture.spec
    assert shares_measured(spec) == ((2, 5), (1, 2), (1, 1))


def test_a_grid_beyond_the_context_is_refused(tiny: Callable[[str], Path]) -> None:
    with Machine(Checkpoint(tiny("llama"))) as machine, pytest.raises(RequestError, match="shorter prompts"):
        Profiler(machine, Grid.up_to(250))


def test_profiling_leaves_no_session_behind(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            async with Profiler(machine, Grid.up_to(16)) as profiler:
                await profiler.round()
            assert not machine._open

    asyncio.run(play())


# Links


class Scene:
    """A worker in this process, and a link to it."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)

    async def play(self, scene: Callable[[Link], object]) -> None:
        with Machine(self.checkpoint) as machine:
            near, far = memory_pair()
            serving = asyncio.create_task(Worker(machine).handle(far))
            await scene(near)  # type: ignore[misc]
            await near.close()
            await serving
            await far.close()

    def hello(self) -> bytes:
        return pack(Hello(messages.PROTOCOL_VERSION, self.checkpoint.fingerprint))


def test_a_probe_finds_what_the_shaper_was_told(tiny: Callable[[str], Path]) -> None:
    one = Scene(tiny("llama"))

    async def scene(link: Link) -> None:
        shaped = ShapedLink(link, LinkShape.parse("rtt=30ms up=4mbit down=16mbit"))
        found = (await probe(shaped, one.checkpoint.fingerprint)).link()
        assert 0.029 < found.rtt_s < 0.06
        assert found.up_bytes_per_s == pytest.approx(0.5e6, rel=0.25)
        assert found.down_bytes_per_s == pytest.approx(2e6, rel=0.25)
        assert LinkSpec.parse(found.text) == found
        await shaped.close()

    asyncio.run(one.play(scene))


def test_a_probe_of_another_model_is_refused(tiny: Callable[[str], Path]) -> None:
    async def scene(link: Link) -> None:
        with pytest.raises((PeerMismatch, LinkDied)):
            await probe(link, "another")

    asyncio.run(Scene(tiny("llama")).play(scene))


async def _answer(link: Link) -> tuple[messages.Header, bytes]:
    frame = await asyncio.wait_for(link.receive(), 10)
    assert frame is not None
    header, payload = unpack(frame)
    return header, bytes(payload)


def test_a_worker_answers_pings_and_then_serves(tiny: Callable[[str], Path]) -> None:
    one = Scene(tiny("llama"))

    async def scene(raw: Link) -> None:
        link = Sequenced(raw)
        await link.send(one.hello())
        assert isinstance((await _answer(link))[0], Welcome)
        await link.send(pack(Ping(1000, stamp=4), b"anything"))
        pong, filling = await _answer(link)
        assert isinstance(pong, Pong)
        assert (pong.stamp, filling) == (4, bytes(1000))
        assert pong.advert is not None
        assert pong.advert["sessions"] == 0
        await link.send(pack(Open("s", 9, ["edge"], 2, [], 0.0, 0, 1.0, 0, 0.0, 0)))
        header, _ = await _answer(link)
        assert isinstance(header, messages.Failed)
        assert "cannot be machine 9" in header.message

    asyncio.run(one.play(scene))


def test_a_link_may_be_pinged_for_as_long_as_it_is_there_and_never_for_too_much(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Scene(tiny("llama"))
    monkeypatch.setattr(worker, "OPENING_S", 0.2)

    async def scene(raw: Link) -> None:
        link = Sequenced(raw)
        await link.send(one.hello())
        await _answer(link)
        for stamp in range(300):
            await link.send(pack(Ping(0, stamp)))
        answers = [(await _answer(link))[0] for _ in range(300)]
        assert [header.stamp for header in answers if isinstance(header, Pong)] == list(range(300))
        header, _ = await _answer(link)
        assert isinstance(header, messages.Failed), "silence ends it"
        assert "within 0.2 s" in header.message

    asyncio.run(one.play(scene))
    with pytest.raises(ProtocolError, match="cannot be read"):
        unpack(pack(Ping(messages.MAX_PING_BYTES + 1)))
    with pytest.raises(ProtocolError, match="cannot be read"):
        unpack(pack(Ping(-1)))


# Meters


class FakeMeter:
    """Draws a fixed power."""

    name = "fake"

    def joules(self) -> float:
        return 5.0 * time.monotonic()

    def close(self) -> None: ...


def test_power_is_energy_over_time(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            async with Profiler(machine, Grid.up_to(16)) as profiler:
                power = await watts(profiler, FakeMeter(), 0.05)
        assert (power.idle, power.decode, power.prefill) == pytest.approx((5.0, 5.0, 5.0), rel=0.01)
        assert power.meter == "fake"

    asyncio.run(play())


def _zone(root: Path, name: str, energy_uj: int) -> Path:
    zone = root / name
    zone.mkdir()
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text("9999999\n")
    return zone


def test_rapl_sums_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    first, second = _zone(tmp_path, "intel-rapl:0", 9_000_000), _zone(tmp_path, "intel-rapl:1", 0)
    _zone(tmp_path, "intel-rapl:0:0", 123)  # a part of package 0, counted in it
    meter = find_meter(tmp_path, tmp_path / "none")
    assert isinstance(meter, Rapl)
    (first / "energy_uj").write_text("1000000\n")
    (second / "energy_uj").write_text("3000000\n")
    assert meter.joules() == pytest.approx(2.0 + 3.0)
    assert "2 packages" in meter.name


def test_a_jetson_is_read_by_its_first_channel(tmp_path: Path) -> None:
    chip = tmp_path / "hwmon3"
    chip.mkdir()
    (chip / "name").write_text("ina3221\n")
    for channel, (millivolt, milliampere) in enumerate(((5000, 2000), (5000, 900)), 1):
        (chip / f"in{channel}_input").write_text(str(millivolt))
        (chip / f"curr{channel}_input").write_text(str(milliampere))
    meter = find_meter(tmp_path / "none", tmp_path)
    assert isinstance(meter, Gauge)
    start_s, before = time.monotonic(), meter.joules()
    time.sleep(0.05)
    assert meter.joules() - before == pytest.approx(10.0 * (time.monotonic() - start_s), rel=0.2)
    meter.close()


def test_no_meter_is_said_and_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_meter(tmp_path / "none", tmp_path / "neither") is None


def test_an_edge_without_that_worker_has_no_messages_to_measure(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            edge = Edge(machine)
            async with Profiler(machine, Grid.up_to(16)) as profiler:
                with pytest.raises(RequestError, match="no worker"):
                    await profiler.messages(edge, "cloud")

    asyncio.run(play())
