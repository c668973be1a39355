"""Folders of recorded links: which files make a link, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitwise_llm.bench.scenarios import Grid, run_grid
from splitwise_llm.errors import SpecError
from splitwise_llm.sim.recordings import LinkFiles, link_files, named, read_recordings, spread_over

SMOOTH = "0 8\n1 16\n2 8\n"
PAUSED = "0 8\n1 16\n2 24\n120 32\n121 40\n"
ASKED = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2023-11-16 18:00:{n:02},10,5\n" for n in range(60))


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name.replace("__", ".").replace("_", "-")).write_text(text)
    return path


@pytest.fixture
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "asked.csv"
    path.write_text(ASKED)
    return path


def test_a_link_is_made_of_the_files_of_one_name(tmp_path: Path) -> None:
    folder(tmp_path, lte__up=SMOOTH, lte__down=SMOOTH, wifi__down=SMOOTH, wifi__up=SMOOTH, lte__rtt="Run 1\n20,30\n")
    lte, wifi = link_files(tmp_path)
    assert lte == LinkFiles("lte", tmp_path / "lte.up", tmp_path / "lte.down", tmp_path / "lte.rtt")
    assert (wifi.name, wifi.down, wifi.rtt) == ("wifi", tmp_path / "wifi.down", tmp_path / "lte.rtt")
    assert lte.text == "up lte.up, down lte.down, rtt lte.rtt"


def test_the_last_word_of_a_name_says_what_it_is_and_other_files_do_not_count(tmp_path: Path) -> None:
    folder(tmp_path, downtown__up=SMOOTH, notes__txt="", S20UPM__csv="", uplink2__csv=SMOOTH)
    assert [one.name for one in link_files(tmp_path)] == ["downtown", "uplink2"]
    assert all(one.down is None and one.rtt is None for one in link_files(tmp_path))


def test_a_manifest_says_which_files_count_and_one_file_may_hold_both_ways(tmp_path: Path) -> None:
    both = "time_since_start,upload,download\n0,8,80\n1,16,160\n"
    net = tmp_path / "net"
    net.mkdir()
    folder(net, star__csv=both, ping__txt="Run 1\n20,30\n", other__up=SMOOTH)
    rows = ["core,file,direction", "1,net/star.csv,up", "1,net/star.csv,down", "1,net/ping.txt,rtt", ",net/other.up,up"]
    (net / "manifest.csv").write_text("\n".join(rows))
    (one,) = link_files(net)
    assert one == LinkFiles("star", net / "star.csv", net / "star.csv", net / "ping.txt")


def test_what_is_read_is_the_link_with_thinned_requests(tmp_path: Path, asked: Path) -> None:
    folder(tmp_path, lte__up=SMOOTH, lte__rtt="Run 1\n20,30\n")
    (one,) = read_recordings(link_files(tmp_path), asked)
    assert one.up.mean_bytes_per_s == pytest.approx(4e6 / 3)
    assert one.down is None
    assert one.rtt is not None
    assert one.rtt.rtt_s == (0.02, 0.03)
    assert len(one.requests.requests) == 2  # of sixty, one a second: one in half a minute


def test_every_recording_with_a_pause_is_named_with_the_line_and_the_flag(tmp_path: Path, asked: Path) -> None:
    folder(tmp_path, a__up=PAUSED, b__up=SMOOTH, b__down=PAUSED)
    with pytest.raises(SpecError, match="nothing is known of the link meanwhile") as caught:
        read_recordings(link_files(tmp_path), asked)
    said = str(caught.value)
    assert said.count(f"{tmp_path / 'a.up'}:4: nothing is known from 2 s after the first row to 120 s") == 1
    assert said.count(f"{tmp_path / 'b.down'}:4: ") == 1, "once, though two links share it"
    assert "b.up" not in said
    assert "give --cut-gaps" in said
    cut = read_recordings(link_files(tmp_path), asked, cut_gaps=True)
    assert [one.up.period_s for one in cut] == pytest.approx([5.0, 3.0])


def test_the_grid_refuses_recordings_before_it_runs_anything(tmp_path: Path, asked: Path) -> None:
    folder(tmp_path, a__up=PAUSED)
    told: list[str] = []
    grid = Grid(quick=True, traces=tmp_path, requests=asked)
    with pytest.raises(SpecError, match="--cut-gaps"):
        run_grid(grid, told.append)
    assert not told
    assert grid.fingerprint != Grid(quick=True, traces=tmp_path, requests=asked, cut_gaps=True).fingerprint


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"notes__txt": ""}, "has no file with 'up' in its name"),
        ({"manifest__csv": "core,file,direction\n"}, "recommends no uplink"),
        ({"manifest__csv": "core,path\n"}, r"manifest\.csv:1: has no column file, direction"),
        ({"manifest__csv": "core,file,direction\n1,a,sideways\n"}, r"manifest\.csv:2: direction is 'sideways'"),
    ],
)
def test_a_folder_without_links_says_what_is_missing(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        link_files(folder(tmp_path, **files))


def test_links_are_found_by_name_and_spread_over_the_list(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no folder"):
        link_files(tmp_path / "nowhere")
    files = [LinkFiles(name, tmp_path, None, None) for name in ("walk", "drive", "train", "bus", "ship")]
    assert named(files, "") is files[0]
    assert named(files, "train") is files[2]
    with pytest.raises(SpecError, match=r"no recorded link 'trian' among walk, .*did you mean 'train'"):
        named(files, "trian")
    assert [one.name for one in spread_over(files, 2)] == ["walk", "train"]


def test_recommended_recordings_with_pauses_are_all_found() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(os.environ.get("SPLITWISE_DATA", beside))
    asked = data / "requests" / "azure2023" / "AzureLLMInferenceTrace_conv_first_two_thirds.csv"
    if not (data / "net" / "manifest.csv").exists() or not asked.exists():
        pytest.skip(f"no recordings in {data}; point SPLITWISE_DATA at the folder that holds net/ and requests/")
    files = [one for one in link_files(data / "net") if "mahimahi" not in str(one.up)]
    assert len(files) == 11
    with pytest.raises(SpecError, match="throughput_driving_5g") as caught:
        read_recordings(files, asked)
    assert str(caught.value).count("starlink") == 1, "once, though one file holds both ways"
    assert len(read_recordings(files, asked, cut_gaps=True)) == 11
