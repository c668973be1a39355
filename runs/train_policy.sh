#!/usr/bin/env bash
# The learned policies from nothing, from an empty machine: weights go to out/training. The high level takes at most
# twenty minutes on two cores; with `high`, `low` or `paper` only that one. Stopped, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
what="${1:-all}"
for one in high low paper; do
  if [ "$what" = all ] || [ "$what" = "$one" ]; then
    processes=()
    if [ "$one" = high ]; then processes=(--processes 2); fi
    .venv/bin/splitwise train --learner "$one" --seed 0 --out "out/training/$one" "${processes[@]}"
  fi
done
for made in high/splitwise low/low_level paper/per_layer; do
  file="$(basename "$made")"
  if [ ! -f "out/training/$made.npz" ]; then continue; fi
  if cmp -s "out/training/$made.npz" "src/splitwise_llm/data/policies/$file.npz"; then
    echo "$file: the shipped weights, bit for bit"
  else
    echo "$file: NOT bit for bit the shipped weights"
  fi
done
