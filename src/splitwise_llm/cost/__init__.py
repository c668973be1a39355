"""Seconds, bytes, FLOP, joules, nats and money of a plan on given machines and links: small pure functions.

| module | prices |
| --- | --- |
| `counts` | what the parts of a model weigh and compute |
| `hosts` | how long a machine takes for them: roofline or measured |
| `measured` | what was measured on a machine, as such a source of times |
| `accuracy` | nats per token that a lossy choice loses |
| `drafting` | how many tokens to draft |
| `chunking` | into how large pieces to cut a prompt |
| `terms` | time as functions of conditions: the form in which a plan is priced once for any link and load |
| `world` | what is priced: model, machines, links, request, drafter, tariff |
| `bill` | a decision: seconds, joules, money, memory, nats, as forms |
| `price` | figures under conditions: `Table` (many bills under many), `price` (one under one) |
| `moving` | going on with another partition in mid-generation |
| `limits` | what forbids a decision, in words |
"""

from splitwise_llm.cost.accuracy import NO_LOSS, Accuracy
from splitwise_llm.cost.bill import HELD_BACK, Bill, bill, memory_bytes
from splitwise_llm.cost.chunking import best_chunk, default_chunk
from splitwise_llm.cost.counts import (
    assigned_kv_bytes,
    assigned_weight_bytes,
    head_flop,
    model_flop,
    table_bytes,
    unit_flop,
    unit_memory_bytes,
    unit_weight_bytes,
    units_in,
    weight_bytes,
)
from splitwise_llm.cost.drafting import best_draft, tokens_per_round
from splitwise_llm.cost.hosts import Host, Rows, UnitTimes, batch_seconds, stage_seconds
from splitwise_llm.cost.limits import UNLIMITED, Floor, Limits, obstacle
from splitwise_llm.cost.measured import Measured
from splitwise_llm.cost.moving import Moving, moving, moving_from
from splitwise_llm.cost.price import Entry, Price, Prices, Table, Work, price
from splitwise_llm.cost.terms import IDLE, Basis, Delay, Form, Load, Pair
from splitwise_llm.cost.world import Drafter, Job, Tariff, World

__all__ = [
    "HELD_BACK",
    "IDLE",
    "NO_LOSS",
    "UNLIMITED",
    "Accuracy",
    "Basis",
    "Bill",
    "Delay",
    "Drafter",
    "Entry",
    "Floor",
    "Form",
    "Host",
    "Job",
    "Limits",
    "Load",
    "Measured",
    "Moving",
    "Pair",
    "Price",
    "Prices",
    "Rows",
    "Table",
    "Tariff",
    "UnitTimes",
    "Work",
    "World",
    "assigned_kv_bytes",
    "assigned_weight_bytes",
    "batch_seconds",
    "best_chunk",
    "best_draft",
    "bill",
    "default_chunk",
    "head_flop",
    "memory_bytes",
    "model_flop",
    "moving",
    "moving_from",
    "obstacle",
    "price",
    "stage_seconds",
    "table_bytes",
    "tokens_per_round",
    "unit_flop",
    "unit_memory_bytes",
    "unit_weight_bytes",
    "units_in",
    "weight_bytes",
]  # fmt: skip
