#!/bin/bash
# A training run on a Cloud TPU slice by gcloud alone: asks for it, installs this clone on every host, trains.
#
#   NAME=pod ZONE=us-east5-a docs/launch/tpu_pod.sh \
#     --gin_file=gin_configs/run/gpt4_1p8t_v5p.gin --gin.DATA_PATHS='["gs://mine/corpus/"]' \
#     --gin.data.DataConfig.store='"/mnt/shared/tokens"' --workdir=gs://mine/runs/gpt4
#
# Words are those of `gpt4moe train`. TYPE counts TensorCores on v5p (v5p-4096: 2,048 chips), chips on v6e (v6e-256).
# The slice stays when training has ended: gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
: "${NAME:?give the slice a NAME}" "${ZONE:?give a ZONE}"
TYPE=${TYPE:-v5p-4096}
case $TYPE in
  v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
  v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
  *) : "${RUNTIME:?which RUNTIME does $TYPE need?}" ;;
esac
cd "$(dirname "$0")/../.."

on_every_host() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }
state() { gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)'; }

if ! state > /dev/null 2>&1; then
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
fi
until [[ $(state) == ACTIVE ]]; do
  case $(state) in
    FAILED | SUSPENDED) echo "the slice $NAME is $(state): see gcloud compute tpus queued-resources describe" >&2; exit 1 ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done

git archive --prefix=gpt4moe/ --output=/tmp/gpt4moe.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/gpt4moe.tar.gz "$NAME": --zone="$ZONE" --worker=all
on_every_host "command -v python3.11 > /dev/null || sudo apt-get install -y -qq python3.11-venv
tar xzf gpt4moe.tar.gz && python3.11 -m venv .venv && .venv/bin/pip install --quiet -e './gpt4moe[tpu,gcs]'"

# All processes of a job end together, within the heartbeat, and so begin again together. Code 2 is a mistake.
words=$(printf ' %q' "$@")
on_every_host "cd gpt4moe
until ../.venv/bin/gpt4moe train$words; do
  code=\$?
  if [ \$code = 2 ]; then exit 2; fi
  sleep 10
done"
