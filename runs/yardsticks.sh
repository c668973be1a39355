#!/usr/bin/env bash
# Regret of drift plus penalty to the best causal policy and to the clairvoyant bound on 22 small cases, from an empty
# machine; figures go to out/yardsticks.json. A quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench yardsticks --json out/yardsticks.json "$@"
