#!/bin/bash
# One task for each GPU, as JAX takes them: it reads Slurm's variables for the address of the
# first task, the number of tasks and the number of this one.
#SBATCH --job-name=$name
$partition#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
$gpus#SBATCH --cpus-per-task=8               # fill in: the cores of a node over its tasks
#SBATCH --time=01:00:00                 # fill in: the longest that your partition allows
##SBATCH --account=NAME                 # fill in, and --qos, where your cluster asks for them
#SBATCH --output=$name-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue                     # after the loss of a node
#SBATCH --signal=TERM@$stop             # to the tasks, five minutes before the time is up

set -euo pipefail
export MOECC_DISTRIBUTED=cluster      # JAX finds the other processes
export MOECC_STEP_SECONDS=$seconds         # a process that makes no step in that time ends
$memory# All tasks end when one does.
status=0
srun --kill-on-bad-exit=1 --label $command || status=$$?
# A training that is told to stop saves and ends with 143; the same command goes on with it.
# $fault is a fault of the machine; srun states the kill of the other tasks, 137, in its place.
case "$$status" in
  143) scontrol requeue "$$SLURM_JOB_ID" ;;
  $fault | 137)
    if [ "$${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then scontrol requeue "$$SLURM_JOB_ID"; fi ;;
esac
exit "$$status"
