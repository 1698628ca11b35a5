"""A vocabulary as files that `transformers` reads by itself."""

import json
from pathlib import Path

from funneltfm.data.tokenization import get_tokenizer
from funneltfm.errors import InputError, brief
from funneltfm.files import write_json


def write_hf_tokenizer(vocabulary: Path, tokenizer_type: str, cased: bool, max_length: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json beside the model's config.json: `[CLS] a [SEP] b [SEP]` with
    segments 2, 0 and 1, as Funnel wants.

    The rules are those of `tokenizers` itself; they differ from ours at a final sigma and for some rare characters
    (see data.tokenization).
    """
    if tokenizer_type != "word_piece":
        raise InputError(
            f"{vocabulary}: a {brief(tokenizer_type)} vocabulary cannot be exported yet; only word_piece can."
        )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ours = get_tokenizer(tokenizer_type, vocabulary, cased)
    cls, sep, pad, unk = ours.convert_ids_to_pieces([ours.cls_id, ours.sep_id, ours.pad_id, ours.unk_id])
    pieces = ours.convert_ids_to_pieces(range(ours.vocab_size))
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if len(pieces) > rows:
        raise InputError(f"{vocabulary} has {len(pieces)} pieces, but the model knows {rows}. Is it the model's own?")
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=unk, max_input_chars_per_word=200)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased, strip_accents=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:2 $A:0 {sep}:0",
        pair=f"{cls}:2 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, ours.cls_id), (sep, ours.sep_id)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"cls_token": cls, "sep_token": sep, "pad_token": pad, "unk_token": unk}
    if ours.mask_id is not None:
        special["mask_token"] = ours.convert_ids_to_pieces([ours.mask_id])[0]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "model_input_names": names}
        | special,
    )


def name_labels(labels: tuple[str, ...] | None, folder: Path) -> None:
    """Put class names into config.json; None is regression."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    names = labels or ("score",)
    outputs = len(config.get("id2label", names))
    if len(names) != outputs or len(set(names)) != outputs:
        raise InputError(
            f"expected the distinct names of {outputs} classes, as many as the model has outputs; got "
            f"{brief(', '.join(names))}. Is the labels.json beside the model its own?"
        )
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    config["problem_type"] = "single_label_classification" if labels else "regression"
    write_json(path, config)
