#!/usr/bin/env bash
# Evaluate a run, or published weights, on Kinetics, by 10 segments × 3 crops.
#   sbatch slurm/eval_kinetics.sh RUN [--key value …]
#SBATCH --job-name=eval_kinetics
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=16 --time=08:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f slurm/launch.sh ] || { echo "error: $PWD is not the repository: submit from its root" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
launch_eval video "${1:-}" "${@:2}"
