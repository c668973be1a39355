#!/usr/bin/env bash
# Constants for the policy's knobs, tuned by a plain optimiser on the training traces, from an empty machine: the policy
# `tuned`, once it is copied to data/policies/tuned.json, which says what it was made with. DECISIONS=N sets the budget:
# the learner's own, to compare with equal ones. About 1,000 decisions a second; stop it at will, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench constants --to out/tuned.json --keep out/tuning.json ${DECISIONS:+--decisions "$DECISIONS"} "$@"
echo "to ship it: cp out/tuned.json src/splitwise_llm/data/policies/tuned.json"
