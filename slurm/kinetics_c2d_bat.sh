#!/usr/bin/env bash
# C2D ResNet-50 with 2-D BAT on Kinetics-400.
#   sbatch slurm/kinetics_c2d_bat.sh --weights_2d FILE [--key value …]
#SBATCH --job-name=kinetics_c2d_bat
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:8 --cpus-per-task=64 --time=48:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f slurm/launch.sh ] || { echo "error: $PWD is not the repository: submit from its root" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
launch_train video c2d_bat "$@"
