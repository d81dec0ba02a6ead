#!/bin/bash
# A workload on a GKE cluster that xpk made, in gcloud's current project and zone.  GKE tells each
# host of a TPU slice its place, and JAX reads it.
set -euo pipefail
xpk workload create \
  --cluster=$cluster \
  --workload=$name \
  --tpu-type=$type --num-slices=$slices \
  --docker-image=$image \
  --max-restarts=$restarts --restart-on-exit-codes=$fault \
  --command=$command
