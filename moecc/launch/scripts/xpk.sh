#!/bin/bash
# A workload on a GKE cluster that xpk made.  GKE tells each host of a TPU slice its place, and
# JAX reads it.  Fill in what stands in capitals.
set -euo pipefail
xpk workload create \
  --cluster=CLUSTER --zone=ZONE --project=PROJECT \
  --workload=$name \
  --tpu-type=TPU_TYPE --num-slices=$nodes \
  --docker-image=IMAGE_WITH_MOECC \
  --max-restarts=$restarts \
  --command=$quoted
