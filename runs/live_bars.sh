#!/usr/bin/env bash
# The two rows of docs/results.md, "The mind", that are of running processes: nats of lossy choices beside the table, and
# peak memory beside what is predicted, from an empty machine. TBD of two cores; 9 GB of memory, 2.2 GB
# of disk (out/memory). Runs of memory that are finished are kept and not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench exactness --live weights --live wires --live plans --json out/live_accuracy.json
.venv/bin/splitwise bench serving --memory bf16 --memory int8 --memory int4 --keep out/memory --json out/memory.json
