"""A machine can be slowed down by sleeping, and not be made faster."""

from __future__ import annotations

import pytest

from splitwise_llm.cost import Host
from splitwise_llm.cost.emulation import emulation_warning, shortfall
from splitwise_llm.spec import DeviceSpec, find_device, find_model


def test_the_worse_of_prompt_and_token_says_whether_a_device_can_be_played() -> None:
    spec, here = find_model("gpt2"), DeviceSpec("here", 1e11, 1e10, 1e10)
    faster_in_prefill = DeviceSpec("npu", 1e12, 5e9, 1e10)  # and half as fast with a token
    assert shortfall(spec, Host(here), Host(here)) == 1.0
    assert shortfall(spec, Host(here), Host(faster_in_prefill)) == pytest.approx(4.6, rel=0.05)
    assert shortfall(spec, Host(here), Host(find_device("a100"))) > 50
    assert shortfall(spec, Host(find_device("a100")), Host(find_device("pi5"))) < 0.1


def test_a_device_that_is_too_fast_is_warned_of_with_the_factor() -> None:
    assert emulation_warning("pi5", 0.3) == ""
    assert emulation_warning("pi5", 1.02) == ""
    assert "a100 is up to 57.3 times faster than this machine" in emulation_warning("a100", 57.31)
