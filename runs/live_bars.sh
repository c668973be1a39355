#!/usr/bin/env bash
# The two rows of docs/results.md, "The mind", that are of running processes: nats of lossy choices beside the table, and
# peak memory beside what is predicted, from an empty machine. An hour and a half of two cores, most of it the nats, some
# three minutes a row (`--live-tokens 4800` for a first look); two processes of up to 2.6 GB each, 2.2 GB of disk
# (out/memory). Runs of memory that are finished are kept and not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench exactness --live weights --live wires --live plans --json out/live_accuracy.json
.venv/bin/splitwise bench serving --memory bf16 --memory int8 --memory int4 --keep out/memory --json out/memory.json
