#!/usr/bin/env bash
# Pretraining on a SLURM cluster, with one task per node that runs torchrun. Before the time limit the run is stopped,
# requeued and resumed.
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 launch/slurm.sh \
#       --data-dir IMAGES --model fcmae_convnextv2_base --amp --global-batch-size 4096 --output runs --experiment base
#
# Options of sbatch come before the script, those of `timm-convnextv2 pretrain` after it. --experiment is required: a
# requeued job resumes the run of that name. On the nodes, `python` (or $PYTHON) must have the package.
#SBATCH --job-name=fcmae
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

case " $* " in *" --experiment"*) ;; *)
    echo "launch/slurm.sh: --experiment NAME is required: a requeued job resumes the run of that name." >&2
    exit 2 ;;
esac
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # one per job: nodes may be shared
# torchrun's --shutdown-timeout: seconds in which processes finish an update and save it (torchrun's default is 30)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
    -m timm_convnextv2 pretrain "$@" --resume auto &
srun=$!
stopped=
trap 'stopped=yes; kill -TERM "$srun"' TERM # srun forwards it to torchrun, and torchrun to the processes
status=0
wait "$srun" || status=$?
if [ -n "$stopped" ]; then
    wait "$srun" || true # the signal ended the first wait, not srun
    echo "Stopped before the time limit; requeued." >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
