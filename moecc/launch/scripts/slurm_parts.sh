#!/bin/bash
# A conversion in parts, each of them a task of an array, and a job that joins them when all are
# complete.  A part that is started again goes on where it was killed.
#SBATCH --job-name=$name
$partition#SBATCH --array=1-$parts
#SBATCH --cpus-per-task=$cpus
#SBATCH --mem=${memory}G
#SBATCH --time=12:00:00                 # fill in: the longest that your partition allows
##SBATCH --account=NAME                 # fill in, and --qos, where your cluster asks for them
#SBATCH --output=$name-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue                     # after the loss of a node

set -euo pipefail
if [ "$$SLURM_ARRAY_TASK_ID" -eq 1 ] && [ "$${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  sbatch --job-name=$name-join --dependency=afterok:"$$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
    --cpus-per-task=$cpus --mem=${memory}G --time=12:00:00 --output=$name-join-%j.log \
    --open-mode=append --requeue --partition="$$SLURM_JOB_PARTITION" \
    $${SLURM_JOB_ACCOUNT:+--account="$$SLURM_JOB_ACCOUNT"} \
    $${SLURM_JOB_QOS:+--qos="$$SLURM_JOB_QOS"} --wrap=$join
fi
status=0
$part || status=$$?
case "$$status" in    # a fault of the machine, or a kill
  $fault | 137)
    if [ "$${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then scontrol requeue "$$SLURM_JOB_ID"; fi ;;
esac
exit "$$status"
