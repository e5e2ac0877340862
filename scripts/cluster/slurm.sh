#!/bin/bash
# One training run on several machines under SLURM, from the repository root:
#
#   sbatch scripts/cluster/slurm.sh --config=configs/jester.py --config.batch_size=64
#
# srun starts one process per GPU. They find each other by SLURM's variables: no flag is needed.
# What stands behind the script's name goes to `python -m rvit_jax.main` as it is.
#
#SBATCH --job-name=rvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4       # one process per GPU ...
#SBATCH --gpus-per-node=4         # ... and so many GPUs
#SBATCH --cpus-per-task=8         # threads that decode videos; 0 workers use them all
#SBATCH --mem-per-cpu=4G
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#
# Two minutes before the time is up, SLURM sends SIGTERM to the processes (not to this script). All
# of them save the same step and leave with 143; the script then puts the job in the queue again,
# and the run goes on where it stood. A signal that comes in an evaluation waits for its end: leave
# more time where that takes longer.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append        # the log of a run that went on is one log

set -u

# The data, and the workdir, must lie on a disk that all machines see. The default workdir is
# results/<config> in the folder that sbatch was called in.
source .venv/bin/activate

# Process 0 listens on all of its machine's interfaces by default. On a cluster that others reach,
# name the one of the inner network (process 0 is on the first machine of the job):
#   export JAX_COORDINATOR_BIND_ADDRESS=10.0.0.1:61234 JAX_COORDINATOR_PORT=61234

# --kill-on-bad-exit: when one process fails, the others are ended at once. --wait=120: after a
# signal they have so long to end after the first of them.
srun --kill-on-bad-exit=1 --wait=120 python -m rvit_jax.main "$@"
status=$?

if [ "$status" -eq 143 ]; then
    echo "stopped by the time limit or an operator, state saved: back in the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
