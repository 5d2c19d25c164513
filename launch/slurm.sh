#!/usr/bin/env bash
# Pretraining on a SLURM cluster: one task a node, which is torchrun; stopped before the time is over, requeued, resumed.
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 launch/slurm.sh \
#       --data-dir IMAGES --model fcmae_convnextv2_base --amp --global-batch-size 4096 --output runs --experiment base
#
# Options of sbatch come before the script, those of `timm-convnextv2 pretrain` after it. --experiment is needed, as the
# name under which the next part of the run finds the last one. On the nodes, `python` (or $PYTHON) has the package.
#SBATCH --job-name=fcmae
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

case " $* " in *" --experiment"*) ;; *)
    echo "launch/slurm.sh: give the run a name, --experiment NAME: a requeued job resumes it." >&2
    exit 2 ;;
esac
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job: nodes may be shared
# What torchrun's --shutdown-timeout says: how long processes may take to finish an update and to save it. Without, 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
    -m timm_convnextv2 pretrain "$@" --resume auto &
srun=$!
stopped=
trap 'stopped=yes; kill -TERM "$srun"' TERM # srun passes it on to torchrun, and that to the processes
status=0
wait "$srun" || status=$?
if [ -n "$stopped" ]; then
    wait "$srun" || true # what ended before was the waiting for it
    echo "Stopped before the end of the time; requeued." >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
