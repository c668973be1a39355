#!/usr/bin/env bash
# The figures of docs/pipelines.md, from an empty machine; about five minutes. Run nothing else meanwhile: the machines
# are emulated by sleeping, but the messages between them are real, and processes of this one.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench pipeline --json out/pipeline.json "$@"
