"""Learning in recorded links: which courses have one, what benches keep for themselves, and what a run remembers."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from forked import splitwise_text
from splitwise_llm.bench.scenarios import recorded as replayed
from splitwise_llm.errors import SpecError
from splitwise_llm.learn.courses import Course, course, courses, recorded_in
from splitwise_llm.learn.judging import Validation
from splitwise_llm.learn.recorded import Recorded, read_recorded
from splitwise_llm.learn.train import CONFIGS, Config, _chosen_by, _origin, _state, read_config, train
from splitwise_llm.policies.guided import Constant
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.paths import as_recorded
from splitwise_llm.sim.recordings import LinkFiles, judged_by, left_to_learn, thinned
from splitwise_llm.sim.scenarios import HEALTHY, TRAIN, Recordings
from splitwise_llm.traces import RateTrace, RttTrace
from splitwise_llm.workload import RecordedRequest, RequestTrace

UP = RateTrace((0.0, 40.0, 60.0, 90.0, 100.0), (4e5, 2e6, 1e6, 0.0, 4e5), 120.0)
LINK = Recordings(None, UP)
REQUESTS = RequestTrace(tuple(RecordedRequest(2.0 * n, 40 * (n + 1), 10 + n) for n in range(40)), 80.0)
ASKED = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{n // 60:02}:{n % 60:02},{20 + n % 90},{5 + n % 7}\n" for n in range(300)
)
PLAIN = 5
"""Of seed 7: a course of one device."""


def folder_of(path: Path, links: int, rates: str = "0 {a}\n20 {b}\n30 0\n34 {a}\n60 {b}\n") -> Path:
    path.mkdir(exist_ok=True)
    for n in range(links):
        (path / f"walk{n}.up").write_text(rates.format(a=2 + n, b=9 + n))
    return path


def asked_in(path: Path, text: str = ASKED) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def plain() -> Course:
    return course(7, PLAIN)


# Dies when paths.py says `down=down, rtt=rtt` for `down=down or up, rtt=rtt`.
def test_classes_of_a_recorded_link_are_its_thirds_and_its_outages() -> None:
    link = as_recorded(HEALTHY, UP, None, RttTrace((0.0, 60.0), (0.03, 0.05), 120.0))
    ups = [kind for kind in link.classes if kind.is_up]
    # 110 s up: 20 s at 2e6 and 30 at 1e6; 40 at 4e5; and 20 at 4e5 with the slower answers
    assert [kind.up_bytes_per_s for kind in ups] == pytest.approx([1.4e6, 4e5, 4e5])
    assert [kind.down_bytes_per_s for kind in ups] == [kind.up_bytes_per_s for kind in ups]
    assert [kind.rtt_s for kind in ups] == pytest.approx([0.042, 0.03, 0.05])
    assert [kind.mean_dwell_s for kind in ups] == pytest.approx([50.0, 40.0, 20.0])
    (outage,) = (kind for kind in link.classes if not kind.is_up)
    assert link.mean_outage_s == outage.mean_dwell_s == 10.0
    assert as_recorded(HEALTHY, UP, None, None).classes[0].rtt_s == HEALTHY.classes[0].rtt_s


def test_a_share_of_the_courses_takes_one_recording_after_the_other_and_the_others_none() -> None:
    two = (("a", LINK), ("b", LINK))
    found = [one and one[0] for one in (recorded_in(n, two, 0.25) for n in range(12))]
    assert found == ["a", None, None, None, "b", None, None, None, "a", None, None, None]
    assert [recorded_in(n, two, 1.0) for n in range(3)] == [two[0], two[1], two[0]]
    assert recorded_in(0, (), 0.25) is None


# Dies when courses.py says `if recordings and has_requests:` for `if recordings:`.
def test_a_recorded_course_differs_from_the_drawn_one_in_its_link_only(plain: Course) -> None:
    walked = course(7, PLAIN, ("walk", LINK))
    assert walked.name == plain.name + "-walk"
    mine, theirs = walked.params, plain.params
    assert mine.link.up is UP
    assert mine.link.periodic is False
    assert (mine.arrivals, mine.cloud, mine.seeing, mine.slots) == (
        theirs.arrivals, theirs.cloud, theirs.seeing, theirs.slots,
    )  # fmt: skip
    assert (walked.guide.tools, walked.guide.limits) == (plain.guide.tools, plain.guide.limits)
    assert walked.guide.w_energy == plain.guide.w_energy
    there, here = (draw(params, TRAIN.seed, range(3), 6, TRAIN.spread) for params in (theirs, mine))
    assert np.array_equal(there.arrival_s, here.arrival_s)
    assert np.array_equal(there.cloud.times_s, here.cloud.times_s)
    assert (here.link.times_s[:, 0, -1] == UP.period_s).all()
    assert len(set(here.link.times_s[:, 0, 1].tolist())) == 3, "each world begins at its own place"


def test_courses_that_are_not_recorded_are_the_same_bit_for_bit() -> None:
    _, after = courses(7, 2, recorded=(("walk", LINK),), share=0.5)
    before = course(7, 1)
    assert before.name == after.name
    for name in ("link", "cloud", "arrivals", "seeing", "penalty", "budgets"):
        assert pickle.dumps(getattr(before.params, name)) == pickle.dumps(getattr(after.params, name))
    each = [simulate(one.params, draw(one.params, 5, range(2), 6), Constant(one.guide)) for one in (before, after)]
    assert np.array_equal(each[0].total_s, each[1].total_s)
    assert np.array_equal(each[0].first_plan, each[1].first_plan)


def test_recorded_requests_come_at_the_load_that_was_drawn(plain: Course) -> None:
    asked = course(7, PLAIN, ("walk", replace(LINK, requests=REQUESTS)))
    arrivals = asked.params.arrivals
    assert arrivals.recorded is not None
    assert max(one.prompt_tokens for one in arrivals.recorded.requests) <= max(asked.params.prompt_classes)
    assert len(asked.params.physics.tables) == len(asked.params.prompt_classes) > 1
    assert asked.params.link.down is UP
    assert arrivals.per_s != plain.params.arrivals.per_s
    traces = draw(asked.params, TRAIN.seed, range(20), 30)
    assert (30 / traces.arrival_s[:, 0, -1]).mean() == pytest.approx(arrivals.per_s, rel=0.3)
    assert isinstance(asked.params.seeing.length_error, float) or asked.params.seeing.length_error is None


@pytest.mark.parametrize("count", range(9, 40))
def test_nothing_is_learned_from_a_file_that_benches_judge_by(count: int) -> None:
    shared = [Path(f"rtt{n}") for n in range(3)]
    files = [LinkFiles(f"l{n}", Path(f"up{n}"), Path(f"down{n // 2}"), shared[n % 3]) for n in range(count)]
    learn, apart = left_to_learn(files)
    judged = {path for quick in (True, False) for one in judged_by(files, quick=quick) for path in one.paths}
    mine, others = ({path for one in some for path in one.paths} for some in (learn, apart))
    assert learn
    assert not mine & judged
    assert not others & judged
    assert not mine & others
    assert {one.up for one in (*learn, *apart, *judged_by(files), *judged_by(files, quick=True))} == {
        one.up for one in files
    }


# Dies when recordings.py says `for quick in (False,)` for `for quick in (False, True)`.
def test_what_benches_replay_is_what_is_kept_from_learning(tmp_path: Path) -> None:
    """Both ends as they are used: what the grid reads, and what training reads, of one folder and one file."""
    folder, asked = folder_of(tmp_path / "net", 18), asked_in(tmp_path / "asked.csv")
    told: list[str] = []
    learned = read_recorded(folder, asked, told.append)
    judged = dict([*replayed(folder, asked, True), *replayed(folder, asked, False)])
    assert len(judged) == 9  # eight, and one more of what is quick
    names = [name for name, _ in (*learned.learn, *learned.apart)]
    assert len(names) == len(set(names)) == 9
    assert not set(names) & set(judged)
    assert told == [
        "of 18 recorded links benches keep 9; to learn in: "
        f"{', '.join(name for name, _ in learned.learn)}; to choose by: {', '.join(name for name, _ in learned.apart)}"
    ]
    replays, teaches = (one.requests for one in (next(iter(judged.values())), learned.learn[0][1]))
    assert replays
    assert teaches
    both = {one.arrival_s for one in replays.requests} & {one.arrival_s for one in teaches.requests}
    assert not both, "no request that benches replay"


@pytest.mark.parametrize("links", [1, 2, 8])
def test_a_folder_that_benches_need_whole_is_refused(tmp_path: Path, links: int) -> None:
    with pytest.raises(SpecError, match=r"benches judge by every .*walk0.*put more than 8 into .*without --traces"):
        read_recorded(folder_of(tmp_path, links), None, lambda _: None)


def test_one_link_that_is_left_is_learned_in_and_two_or_more_choose_too(tmp_path: Path) -> None:
    for links, sizes in ((9, (1, 0)), (10, (1, 1)), (14, (4, 2))):
        files = [LinkFiles(f"l{n}", Path(f"up{n}"), None, None) for n in range(links)]
        assert tuple(map(len, left_to_learn(files))) == sizes
    told: list[str] = []
    assert not read_recorded(folder_of(tmp_path, 9), None, told.append).apart
    assert "to choose by: none is left" in told[0]


def test_requests_that_benches_would_replay_every_one_of_are_refused() -> None:
    few = RequestTrace(tuple(RecordedRequest(30.0 * n, 10, 5) for n in range(9)), 270.0)
    with pytest.raises(SpecError, match=r"9 recorded requests in 270 s.*train without --requests"):
        thinned(few, to_learn=True)
    assert thinned(few) == few
    short = RequestTrace(tuple(RecordedRequest(n / 10, 10, 5) for n in range(9)), 1.0)
    with pytest.raises(SpecError, match="train without --requests"):
        thinned(short, to_learn=True)


def test_a_run_remembers_what_was_recorded(tmp_path: Path) -> None:
    tiny = CONFIGS["tiny"]
    given, other = Recorded((("a", LINK),), ()), Recorded((("a", replace(LINK, requests=REQUESTS)),), ())
    slower = Recorded((("a", replace(LINK, up=replace(UP, bytes_per_s=(4e5, 2e6, 1e6, 0.0, 5e5)))),), ())
    assert _origin(None, (), None) == {"start": None, "given": []}, "runs without recordings are those of before"
    origin = _origin(None, (), given)
    begun = _state(tiny, tmp_path, origin)
    assert _state(tiny, tmp_path, origin) == begun
    for another in (None, other, slower, Recorded(given.learn, given.learn)):
        with pytest.raises(SpecError, match="records or recordings; give another --out, or --fresh"):
            _state(tiny, tmp_path, _origin(None, (), another))
    with pytest.raises(SpecError, match="another configuration"):
        _state(replace(tiny, recorded=0.5), tmp_path, origin)


def test_a_run_from_before_there_were_recordings_goes_on(tmp_path: Path) -> None:
    tiny = CONFIGS["tiny"]
    _state(tiny, tmp_path, _origin(None, ()))
    file = tmp_path / "state.json"
    state = json.loads(file.read_text())
    del state["config"]["recorded"]
    file.write_text(json.dumps(state))
    assert _state(tiny, tmp_path, _origin(None, ()))["updates"] == 0


# Dies when learn/train.py says `if was != asked:` for `if was != asked or is_older:`.
@pytest.mark.parametrize(
    ("kept", "says"),
    [("{}", "tells of no run"), ('{"config": ', "tells of no run"), ("[1]", "tells of no run"),
     (json.dumps({"config": {"seed": 0, "cautions": [0.0, 1.5]}, "updates": 5, "curve": [[5, 0.1]]}), "of another ver"),
     (json.dumps({"config": asdict(CONFIGS["tiny"]), "updates": 5, "curve": [[5, 0.1]]}), "of another version")],
)  # fmt: skip
def test_a_folder_that_no_run_of_today_left_is_refused_with_what_to_do(tmp_path: Path, kept: str, says: str) -> None:
    (tmp_path / "state.json").write_text(kept)
    with pytest.raises(SpecError, match=f"{says}.*; give another --out, or --fresh to begin anew"):
        _state(CONFIGS["tiny"], tmp_path, _origin(None, ()))


def test_the_share_is_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"recorded": 0.5}')
    assert read_config(str(file)).recorded == 0.5
    for share in ("0", "1.5", "-1"):
        file.write_text(f'{{"recorded": {share}}}')
        with pytest.raises(SpecError, match="above 0 and at most 1"):
            read_config(str(file))


PAUSED = "0 8\n1 16\n2 24\n120 32\n121 40\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--requests", "asked.csv"), "give --traces DIR, too"),
        (("--cut-gaps",), "give --traces DIR, too"),
        (("--config", "typo"), "unknown training configuration 'typo'"),
        (("--start", "nowhere.npz"), "nowhere.npz: no weights of a policy"),
        (("--learner", "low", "--config", "tiny"), "are for --learner high, not low"),
        (("--traces", "nowhere"), "is no folder"),
        (("--traces", "empty"), "has no file with 'up' in its name"),
        (("--traces", "few"), "put more than 8 into the folder"),
        (("--traces", "paused"), "give --cut-gaps"),
        (("--traces", "silent"), "walk8: the recorded link is never up"),
        (("--traces", "net", "--requests", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--traces", "net", "--learner", "low"), "are for --learner high, not low"),
    ],
)
def test_what_cannot_be_learned_from_is_said_and_leaves_a_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "few", 3), folder_of(tmp_path / "net", 12), folder_of(tmp_path / "paused", 12, PAUSED)
    folder_of(tmp_path / "silent", 9, "0 0.00{a}\n60 0.00{a}\n")
    (tmp_path / "empty").mkdir()
    kept = tmp_path / "training" / "state.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    given = () if "--config" in arguments else ("--config", "tiny")
    done = splitwise_text("train", "--fresh", *given, *arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert kept.exists()


SMALL = {
    "courses": 1, "worlds": 1, "requests": 4, "lesson_worlds": 2, "lesson_requests": 2, "imitation": 5, "decisions": 0,
    "validation": 1, "validation_worlds": 2,
}  # fmt: skip


def test_training_in_recorded_links_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "net", 10)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    given = ("train", "--config", "small.json", "--out", "own", "--traces", "net")
    done = splitwise_text(*given)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "of 10 recorded links benches keep 8; to learn in: walk8; to choose by: walk9" in said
    assert "1 courses are drawn, 25% of them in recorded links" in said
    assert "-walk8: " in said
    assert (tmp_path / "own" / "splitwise.npz").exists()
    other = splitwise_text(*given[:-2])
    assert other.returncode == 2
    assert "records or recordings" in " ".join(other.stderr.split())


@pytest.mark.long
def test_a_stopped_run_in_recorded_links_goes_on(tmp_path: Path) -> None:
    net = folder_of(tmp_path / "net", 10)
    config = replace(CONFIGS["default"], **(SMALL | {"worlds": 2, "decisions": 128, "steps": 16, "minibatch": 32}))
    config = replace(config, validate_every=1)
    told: list[str] = []
    given = read_recorded(net, None, told.append)
    first = train(config, tmp_path / "own", told.append, recorded=given).read_bytes()
    state = json.loads((tmp_path / "own" / "state.json").read_text())
    (tmp_path / "own" / "state.json").write_text(json.dumps(state | {"updates": 2}))
    again = train(config, tmp_path / "own", told.append, recorded=read_recorded(net, None, told.append))
    assert "going on after 2 of 4 updates" in told
    assert again.exists()
    assert first
    assert sum("-walk9" in name for name in _names(config, given)) == 1


# Dies when learn/train.py says `if (folder / "learner.zip").exists():` for
# `if "alone" in state:  # which is written last of what going on needs`.
@pytest.mark.long
def test_a_run_that_was_stopped_as_it_was_written_first_learns_its_lessons_again(tmp_path: Path) -> None:
    config, told = replace(CONFIGS["default"], **SMALL), list[str]()
    begun = _state(config, tmp_path, _origin(None, ()))
    whole = train(config, tmp_path, told.append).read_bytes()
    (tmp_path / "state.json").write_text(json.dumps(begun))
    (tmp_path / "range.npz").unlink()
    assert train(config, tmp_path, told.append).read_bytes() == whole


def _names(config: Config, given: Recorded) -> list[str]:
    return Validation(1, 4, 6, more=_chosen_by(config, given, 1)).names


def test_recorded_links_that_are_there_can_be_learned_in() -> None:
    folder = Path(os.environ.get("SPLITWISE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    asked = folder / "requests" / "azure2023" / "AzureLLMInferenceTrace_conv_first_two_thirds.csv"
    if not (folder / "net" / "manifest.csv").exists() or not asked.exists():
        pytest.skip(f"no recordings in {folder}; point SPLITWISE_DATA at the folder that holds net/ and requests/")
    found = read_recorded(folder / "net", asked, lambda _: None, cut_gaps=True)
    assert len(found.learn) == 4
    assert len(found.apart) == 2
    one = course(7, PLAIN, found.learn[0])
    assert one.params.link.up is found.learn[0][1].up
    draw(one.params, TRAIN.seed, range(2), 6)
