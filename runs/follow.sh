#!/usr/bin/env bash
# The table and the figure of docs/live.md, from an empty machine; about 20 minutes. The recorded link is not in
# the repository: mahimahi's ATT-LTE-driving (github.com/ravinet/mahimahi, traces/), in SPLITWISE_DATA/net/mahimahi. Run
# nothing else meanwhile: device and worker are processes of this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
net="${SPLITWISE_DATA:-../shared/data}/net/mahimahi"
for way in up down; do
  test -f "$net/ATT-LTE-driving.$way.gz" || { echo "no $net/ATT-LTE-driving.$way.gz; set SPLITWISE_DATA"; exit 1; }
done
.venv/bin/splitwise bench follow --up "$net/ATT-LTE-driving.up.gz" --down "$net/ATT-LTE-driving.down.gz" \
  --json out/follow.json --figure out/follow.svg "$@"
