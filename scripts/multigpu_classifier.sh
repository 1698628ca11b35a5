#!/usr/bin/env bash
# Finetune a Funnel-Transformer in several processes: one for each GPU, or two on a CPU.
#
#   bash scripts/multigpu_classifier.sh              the built-in sample, as scripts/classifier.sh, half the batch a process
#   pretrain_dir=... task_name=MNLI data_dir=data/glue/MNLI bash scripts/multigpu_classifier.sh --train_bsz=8
#
# train_bsz is the batch of each process. Arguments go to multigpu_classifier.py and win over what is set here.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${task_name:-}" ]; then set -- --train_bsz=16 "$@"; fi
PROGRAM=multigpu_classifier.py exec bash "$ROOT/scripts/classifier.sh" "$@"
