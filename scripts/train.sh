#!/usr/bin/env bash
# Train any encoder on any pipeline.
#
#   bash scripts/train.sh                            a small Funnel on the built-in sample, classes and masked words
#   bash scripts/train.sh --pipeline answer_selection --pre_trained_model roberta-base --train_dataset train.jsonl ...
#
# Arguments go to `funneltfm train`; docs/pipelines.md explains them, --help lists them.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=datasets,hf bash "$ROOT/scripts/setup.sh"
PYTHON=$ROOT/.venv/bin/python

if [ $# -eq 0 ]; then
    data_dir=${data_dir:-$ROOT/data/sample}
    if [ ! -e "$data_dir/vocab.txt" ]; then "$PYTHON" "$ROOT/data-scripts/make_sample.py" "$data_dir"; fi
    set -- --pipeline masked_lm+seq_class --model funnel --name sample --overwrite \
        --additional_config_kwargs block_size=1_1 d_embed=64 d_model=64 n_head=2 d_head=32 d_inner=256 decoder_size=1 \
        --pre_trained_tokenizer "$data_dir/vocab.txt" --input_columns text_a --masked_lm_weight 0.1 \
        --train_dataset "$data_dir/train.jsonl" --valid_dataset "$data_dir/valid.jsonl" \
        --test_dataset "$data_dir/test.jsonl" --max_epochs 5 --learning_rate 1e-3 --weight_decay 0.01
fi
exec "$PYTHON" -m funneltfm train "$@"
