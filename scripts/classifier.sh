#!/usr/bin/env bash
# Finetune a Funnel-Transformer.
#
#   bash scripts/classifier.sh                       the built-in sample, from scratch, in about two minutes on a CPU
#   pretrain_dir=pretrained/B4-4-4H768-ELEC-PT task_name=CoLA data_dir=data/glue/CoLA bash scripts/classifier.sh --lr=2e-5
#   pretrain_dir=pretrained/mine bash scripts/classifier.sh       the sample, from a checkpoint (scripts/pretrain.sh makes one)
#
# Arguments go to classifier.py and win over what is set here; --help lists them.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$ROOT/scripts/setup.sh"
PYTHON=$ROOT/.venv/bin/python

if [ -n "${task_name:-}" ]; then
    : "${data_dir:?name the folder with the files of $task_name: data_dir=...}"
    : "${pretrain_dir:?name the folder of an unpacked checkpoint: pretrain_dir=... (download_all_ckpts.sh gets them)}"
fi
if [ -n "${pretrain_dir:-}" ]; then
    for vocab in vocab.uncased.txt vocab.txt; do
        if [ -e "$pretrain_dir/$vocab" ]; then break; fi
    done
    model=(
        --tokenizer_path="$pretrain_dir/$vocab" --init_ckpt="$pretrain_dir/model.pt" --attn_type=rel_shift --truncate_seq
    )
    # Beside a vocabulary of train-tokenizer lies what says whether texts become lower case; the published ones do.
    rules=$pretrain_dir/tokenizer.json
    if [ -e "$rules" ] && ! grep -Eq '"lowercase": ?true|"type": ?"Lowercase"' "$rules"; then model+=(--cased); fi
fi
if [ -n "${task_name:-}" ]; then
    flags=(--dataset="$task_name" --data_dir="$data_dir" "${model[@]}" --write_prediction)
else
    data_dir=${data_dir:-$ROOT/data/sample}
    if [ ! -e "$data_dir/vocab.txt" ]; then "$PYTHON" "$ROOT/data-scripts/make_sample.py" "$data_dir"; fi
    if [ -z "${pretrain_dir:-}" ]; then
        model=(
            --tokenizer_path="$data_dir/vocab.txt" --block_size=2_2_2 --d_embed=64 --d_model=64 --n_head=2 --d_head=32
            --d_inner=256 --separate_cls --pool_q_only --truncate_seq --dropout=0 --dropatt=0
        )
    fi
    flags=(
        --dataset=custom --data_dir="$data_dir" --output_dir="$ROOT/proc_data" "${model[@]}"
        --lr=5e-4 --epochs=10 --train_bsz=32 --n_log_epoch=1 --baselines --write_prediction
    )
fi
exec "$PYTHON" "$ROOT/pytorch/${PROGRAM:-classifier.py}" "${flags[@]}" "$@"
