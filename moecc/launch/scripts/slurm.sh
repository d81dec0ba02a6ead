#!/bin/bash
# One task for each GPU, as JAX takes them: it reads Slurm's variables for the address of the
# first task, the number of tasks and the number of this one.  Change what your cluster wants.
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=$name-%j.log

set -euo pipefail
export MOECC_DISTRIBUTED=cluster      # JAX finds the other processes
export MOECC_STEP_SECONDS=$seconds         # a process that makes no step in that time ends
# All tasks end when one does.
srun --kill-on-bad-exit=1 --label $command
