#!/usr/bin/env bash
# Pretrain a small Funnel-Transformer on text files, with ELECTRA or by masked words.
#
#   bash scripts/pretrain.sh                                    the built-in sample, in some minutes on a CPU
#   bash scripts/pretrain.sh corpus/*.txt --max_steps=100000    your own text
#
# Texts are what `funneltfm train` reads: .txt (an empty line ends a document), .jsonl, .csv, .parquet, dataset folders. Flags
# after them go to `funneltfm train` and win over what is set here; --resume goes on with a run that was stopped. More:
#
#   objective=electra     or mlm: masked words (after a short pretraining they are level: docs/reproduce.md)
#   name=small            what the run is called (default: small-OBJECTIVE)
#   valid=held-out.txt    text to validate on; the best model is chosen by it
#   columns="title:body"  columns with the texts, as in --input_columns (default: text), for the tokenizer and the training
#   tokenizer=FOLDER      a tokenizer that is there. Default: one of vocab_size=8000 pieces is learned from the texts, into
#                         output_dir/tokenizers/NAME, once; with --overwrite among the flags anew
#   output_dir=outputs    the run: runs/NAME (metrics.csv, curves.png), checkpoints/NAME, pre_trained_models/NAME
#   pretrain_dir=...      the result, which scripts/classifier.sh finetunes (default: pretrained/NAME)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=datasets,hf bash "$ROOT/scripts/setup.sh"
FUNNELTFM=("$ROOT/.venv/bin/python" -m funneltfm)

objective=${objective:-electra}
case $objective in
    electra) task=(--pipeline token_detection_and_masked_lm --embedding_sharing gdes) ;;
    mlm) task=(--pipeline masked_lm) ;;
    *)
        echo "pretrain: objective must be electra or mlm; got $objective" >&2
        exit 2
        ;;
esac
texts=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    texts+=("$1")
    shift
done
if [ ${#texts[@]} -eq 0 ]; then
    name=${name:-sample-$objective}
    data_dir=${data_dir:-$ROOT/data/sample}
    if [ ! -e "$data_dir/vocab.txt" ]; then "$ROOT/.venv/bin/python" "$ROOT/data-scripts/make_sample.py" "$data_dir"; fi
    texts=("$data_dir/train.jsonl")
    valid=${valid:-$data_dir/valid.jsonl}
    columns=${columns:-text_a}
    learn=(--vocab_size "${vocab_size:-500}")
    flags=(--max_sequence_length 64 --max_steps 1000 --log_every_n_steps 20)
    every=200
else
    learn=(--vocab_size "${vocab_size:-8000}")
    flags=(--max_sequence_length 128 --max_steps 20000)
    every=1000
fi
if [ -n "${columns:-}" ]; then
    read -ra names <<<"$columns"
    learn+=(--input_columns "${names[@]}")
    flags+=(--input_columns "${names[@]}")
fi
if [ -n "${valid:-}" ]; then
    # The detector's scores fall as the generator learns, so the best model is that of the best generator.
    flags+=(--valid_dataset "$valid" --val_check_interval $every --check_val_every_n_epoch none
        --monitor valid/masked_lm/perplexity)
else
    flags+=(--checkpoint_interval $every)
fi
name=${name:-small-$objective}
output_dir=${output_dir:-outputs}
case " $* " in
    *" --streaming "* | *" --streaming=true "*) ;; # for what fits nowhere
    *) flags+=(--tokenized_dir "$output_dir/tokenized") ;;
esac
pretrain_dir=${pretrain_dir:-pretrained/$name}

if [ -n "${tokenizer:-}" ]; then
    if [ ! -d "$tokenizer" ]; then
        echo "pretrain: tokenizer=$tokenizer must be the folder of a tokenizer (funneltfm train-tokenizer makes one); there" \
            "is none. Leave it out to learn one from the texts." >&2
        exit 2
    fi
else
    tokenizer=$output_dir/tokenizers/$name
    anew=
    case " $* " in *" --overwrite "* | *" --overwrite=true "*) anew=--overwrite ;; esac
    if [ -e "$tokenizer" ] && [ -z "$anew" ]; then
        echo "pretrain: using the tokenizer $tokenizer, which is there; with --overwrite it is learned anew" >&2
    else
        "${FUNNELTFM[@]}" train-tokenizer "${texts[@]}" -o "$tokenizer" "${learn[@]}" $anew
    fi
fi
"${FUNNELTFM[@]}" train "${task[@]}" --name "$name" --output_dir "$output_dir" --model funnel \
    --additional_config_kwargs block_size=2_2_2 decoder_size=1 d_model=128 d_embed=128 n_head=2 d_head=64 d_inner=512 \
    separate_cls=true pool_q_only=true truncate_seq=true \
    --pre_trained_tokenizer "$tokenizer" --train_dataset "${texts[@]}" \
    --packing --across_documents \
    --batch_size 32 --learning_rate 1e-3 --weight_decay 0.01 --num_warmup_steps 0.1 --gradient_clip_val 1.0 \
    "${flags[@]}" "$@"

run=$output_dir/runs/$name
"${FUNNELTFM[@]}" curves "$run"
"${FUNNELTFM[@]}" convert-ckpt --from=funneltfm --to=pt --overwrite "$output_dir/pre_trained_models/$name/best" "$pretrain_dir"
if [ ! -e "$tokenizer/vocab.txt" ]; then
    echo "pretrain: $tokenizer has no vocab.txt, which classifier.sh needs: finetune" \
        "$output_dir/pre_trained_models/$name/best with scripts/train.sh" >&2
    exit
fi
cp "$tokenizer/vocab.txt" "$pretrain_dir/vocab.txt"
echo "pretrain: finetune it with" >&2
echo "    pretrain_dir=$pretrain_dir task_name=CoLA data_dir=data/glue/CoLA bash scripts/classifier.sh --lr=3e-4" >&2
