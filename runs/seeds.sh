#!/usr/bin/env bash
# Five trainings of the policy splitwise that differ by their seed, from an empty machine, and what each is worth on the
# test traces: rows `splitwise@seed-N` of out/seeds.json. About twenty minutes of two cores for each training; stopped, it
# goes on where it was. The first is what `runs/train_policy.sh` makes.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out/seeds out/cells
for seed in 0 1 2 3 4; do
  .venv/bin/splitwise train --learner high --seed "$seed" --processes 2 --out "out/training/seed-$seed"
  cp "out/training/seed-$seed/splitwise.npz" "out/seeds/seed-$seed.npz"
done
scenarios=()
for name in healthy-cloud capable-edge private-mec private-wan flaky-wan tunnel day long-prompt; do
  scenarios+=(--scenario "$name")
done
.venv/bin/splitwise bench scenarios --few --worlds 12 --requests-per-trace 60 --keep out/cells --weights out/seeds \
  --json out/seeds.json "${scenarios[@]}" "$@"
