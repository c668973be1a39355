#!/usr/bin/env bash
# Trainings that differ by their seed, from an empty machine: five of the policy splitwise, three of the paper's, and three
# vectors of constants as they are found (what ships is checked on other traces, too: `runs/tune_constants.sh`); and what
# each is worth on the test traces: rows `splitwise@seed-N`, `splitwise-paper@paper-N` and `tuned@found-N` of
# out/seeds.json. About twenty minutes of two cores for each of the first, five for each of the second, forty of one for
# each vector; stopped, it goes on where it was. Seeds 0 of the first two are what `runs/train_policy.sh` makes.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out/seeds out/seed-cells
for seed in 0 1 2 3 4; do
  .venv/bin/splitwise train --learner high --seed "$seed" --processes 2 --out "out/training/seed-$seed"
  cp "out/training/seed-$seed/splitwise.npz" "out/seeds/seed-$seed.npz"
done
for seed in 0 1 2; do
  .venv/bin/splitwise train --learner paper --seed "$seed" --out "out/training/paper-$seed"
  cp "out/training/paper-$seed/per_layer.npz" "out/seeds/paper-$seed.npz"
  .venv/bin/splitwise bench constants --seed "$seed" --check-traces 0 --keep "out/training/tuning-$seed.json" \
    --to "out/seeds/found-$seed.json"
done
scenarios=()
for name in healthy-cloud capable-edge private-mec private-wan flaky-wan tunnel day long-prompt; do
  scenarios+=(--scenario "$name")
done
.venv/bin/splitwise bench scenarios --few --worlds 12 --requests-per-trace 60 --keep out/seed-cells --weights out/seeds \
  --json out/seeds.json "${scenarios[@]}" "$@"
