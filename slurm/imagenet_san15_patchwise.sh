#!/usr/bin/env bash
# SAN15 with patchwise self-attention on ImageNet.
#   sbatch slurm/imagenet_san15_patchwise.sh [--key value …]
#SBATCH --job-name=imagenet_san15_patchwise
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:8 --cpus-per-task=64 --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f slurm/launch.sh ] || { echo "error: $PWD is not the repository: submit from its root" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
launch_train image san15_patchwise "$@"
