#!/usr/bin/env bash
# Make ImageNet from its archives, by all cores of one node; requeued, it goes on behind the last finished shard.
#   sbatch slurm/prepare_imagenet.sh ARCHIVES OUT [--option value …]
#SBATCH --job-name=prepare_imagenet
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=32 --time=08:00:00
#SBATCH --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f slurm/launch.sh ] || { echo "error: $PWD is not the repository: submit from its root" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
[ $# -ge 2 ] || fail "expected the archives' folder and the folder to make: slurm/prepare_imagenet.sh ARCHIVES OUT"
enter_environment
submit_unless_in_a_job
exec "${container[@]}" python image/prepare.py imagenet "$1" "$2" --workers "$SLURM_CPUS_PER_TASK" "${@:3}"
