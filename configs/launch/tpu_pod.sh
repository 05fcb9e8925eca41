#!/usr/bin/env bash
# bash configs/launch/tpu_pod.sh NAME ZONE gs://BUCKET COMMAND...
# Runs one command on every host of a Cloud TPU slice, here a v6e-64 (8x8, 16 hosts of 4 chips). A queued resource waits
# for the slice. The hosts find each other, since XFLOW_DISTRIBUTED=1 makes JAX look for them. A further command with the
# same NAME uses the same slice, which stays until it is deleted:
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
#
#   bash configs/launch/tpu_pod.sh align us-east5-a gs://my-bucket \
#     python -m train.align configs/align_llada_8b.toml mesh=1,64,1 \
#     model=gs://my-bucket/llada-8b data='["gs://my-bucket/self_generate/responses.*-of-*.jsonl"]' out=gs://my-bucket/align
set -eu
name=$1 zone=$2 bucket=$3
shift 3

state() { # empty without such a resource
  gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format='value(state.state)' 2>/dev/null || true
}
case "$(state)" in # of a slice that was taken back
  SUSPENDED | FAILED) gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet ;;
esac
if [ -z "$(state)" ]; then
  gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type v6e-64 --runtime-version v2-alpha-tpuv6e --spot
fi
until [ "$(state)" = ACTIVE ]; do sleep 30; done

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}
on_all_hosts "test -d xflow-jax || git clone https://github.com/OWNER/xflow-jax; cd xflow-jax && python3 -m venv .venv && \
  .venv/bin/pip install -q -c constraints.txt -e '.[tpu,gcs,data]'"
# Status 75 or 134 (JAX has aborted) means that the run was interrupted and goes on from its last checkpoint.
until on_all_hosts "cd xflow-jax && . .venv/bin/activate && \
  XFLOW_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=$bucket/programs $(printf '%q ' "$@")"; do
  case $? in 75 | 134) ;; *) exit 1 ;; esac
done
