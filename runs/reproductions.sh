#!/usr/bin/env bash
# The tables of docs/reproductions.md, from an empty machine; figures go to out/reproductions.json. With --measure the
# table of nats by split and element loss is measured again first (ten minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
if [ "${1:-}" = --measure ]; then
  shift
  .venv/bin/splitwise bench layer-splitting --out src/splitwise_llm/data/accuracy/layer_splitting.json
fi
.venv/bin/splitwise bench reproductions --page docs/reproductions.md --json out/reproductions.json "$@"
