#!/usr/bin/env bash
# The two rows of docs/results.md, "The mind", that are of running processes: nats of lossy choices beside the table, and
# peak memory beside what is predicted, from an empty machine. Two hours of two cores, most of it the nats, some three
# minutes a row; two processes of up to 2.6 GB each, 2.2 GB of disk (out/memory). Finished parts are kept, those of
# memory run by run, and not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
for part in weights wires plans; do
  text=()
  if [ "$part" = weights ]; then  # which the table has from there
    text=(--text src/splitwise_llm/data/excerpt.txt --live-tokens 4800)
  fi
  if [ ! -s "out/live_$part.json" ]; then
    .venv/bin/splitwise bench exactness --live "$part" "${text[@]}" --json "out/live_$part.json"
  fi
done
.venv/bin/splitwise bench serving --memory bf16 --memory int8 --memory int4 --keep out/memory --json out/memory.json
