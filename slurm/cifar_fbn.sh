#!/usr/bin/env bash
# An FBN network on CIFAR; MODEL is a recipe in cifar/recipes, such as resnet164_fbn_cifar10.
#   sbatch slurm/cifar_fbn.sh MODEL [--key value …]
#SBATCH --job-name=cifar_fbn
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=8 --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f slurm/launch.sh ] || { echo "error: $PWD is not the repository: submit from its root" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
launch_train cifar "${1:-}" "${@:2}"
