"""The flags of the tasks, and which task reads which. No torch here: `funneltfm train --help` is quick."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from funneltfm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ColumnFlags:
    """Columns of the data"""

    input_columns: tuple[str, ...] | None = None
    """Columns with the texts, in order. a:b joins two columns with a space; *a is a column with a list of texts, each
    a text of its own; +a is a list that is joined with spaces. Default: text, or what the pipeline's data usually has.
    """
    input_column: str | None = None
    """token_class: column with the list of words (default: words). Elsewhere another name for one input_columns."""
    label_column: str | None = None
    """Column with the label (default: label), for token_class with the list of labels, for question_answering with the
    spans (default: labels); null or empty where there is none.
    """
    index_column: str | None = None
    """Column that says which rows belong together: the query's id (default: equal queries are one query)."""
    num_labels: int | None = None
    """Number of classes. Default: as many as the training data has."""
    regression: bool = False
    """seq_class: labels are numbers to predict, not classes."""
    label_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, in the order of the labels."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes evenly."""
    task_flags: tuple[str, ...] = ()
    """label_column, num_labels or label_weights (with commas) of one task of a mixture, as in
    seq_class.label_column=topic token_class.label_column=tags token_class.label_weights=1,2.5.
    """


@dataclass(frozen=True, kw_only=True)
class MaskedLMFlags:
    """Masked language modelling"""

    probability: float = 0.15
    """Share of the tokens that are selected. denoising by infilling: 0.3 by default."""
    probability_masked: float = 0.8
    """Share of the selected tokens that become the mask."""
    probability_replaced: float = 0.1
    """Share of the selected tokens that become a random token (with 0, 1, 0: swapped language modelling)."""
    probability_unchanged: float = 0.1
    """Share of the selected tokens that stay as they are."""
    whole_word_masking: bool = False
    """Select whole words, not pieces."""
    exact_masking: bool = False
    """Select exactly the given share of every text (at least one token), not on average."""
    packing: bool = False
    """Make blocks of max_sequence_length of each document, its sentences one after another; nothing is lost. A row is a
    document, its lines are its sentences; in .txt and .tokens an empty line ends a document. Not in mixtures with
    tasks that read labels.
    """
    across_documents: bool = False
    """With packing: blocks go on from one document to the next, with a separator between them."""
    sentence_pairs: bool = False
    """Make examples of two segments of a document, each of whole sentences, the second the continuation of the first;
    nothing is lost. Rows and lines as with packing, and in the same mixtures.
    """
    short_pairs: float = 0.0
    """With sentence_pairs: share of the examples that end before they are full, at a random length (BERT: 0.1)."""


@dataclass(frozen=True, kw_only=True)
class DetectionFlags:
    """Detection of replaced tokens"""

    whole_word_detection: bool = False
    """random_token_detection and cluster_random_token_detection: replace whole words, not pieces."""
    beta: float = 2.0
    """cluster_random_token_detection: how much more often clusters are drawn with which the model fails; 0 is not."""
    update_only_on_predictions: bool = False
    """cluster_random_token_detection: count what the model says of replaced tokens only, not of all."""
    sample_function: Literal["gumbel", "multinomial"] = "gumbel"
    """electra: how the generator's tokens are drawn; both draw from its softmax."""
    embedding_sharing: Literal["none", "tied", "gdes"] = "none"
    """electra: generator and discriminator have embeddings of their own; the same; or the discriminator adds its own
    to those of the generator, into which none of its gradients go (GDES).
    """
    tie_generator_discriminator_embeddings: bool = False
    """Older name of embedding_sharing tied."""
    generator_size: float = 0.5
    """electra: share of the discriminator's hidden width, heads and feed-forward width that the generator has. With
    shared embeddings, where those are as wide as the hidden layers, it is the share of the layers. Not for a
    pre_trained_model with a generator of its own.
    """


@dataclass(frozen=True, kw_only=True)
class TokenFlags:
    """Tagging"""

    label_scheme: Literal["auto", "bio", "bioes", "iob1", "none"] = "auto"
    """How labels mark entities; auto looks at the labels, none scores words alone (parts of speech). bio and iob1
    have B-TYPE, I-TYPE and O, bioes has E-TYPE and S-TYPE (or L- and U-) too.
    """


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringFlags:
    """Question answering"""

    query_column: str = "question"
    """Column of the question."""
    context_column: str = "context"
    """Column of the text in which the answer is."""
    answers_column: str = "answers"
    """Column of the right answers: texts with answer_start; or texts alone, with their places, start and end with the
    end inclusive, in label_column (default: labels). Rows as SQuAD's and MRQA's files have them are taken apart.
    """
    doc_stride: int = 128
    """Tokens that neighbouring windows of a long text share."""
    max_query_length: int = 64
    """Longest question in tokens; longer ones lose their end."""
    max_answer_length: int = 30
    """Longest answer in tokens."""
    n_best_size: int = 20
    """Starts and ends that are looked at for the best answer."""
    null_threshold: float | None = None
    """Say that there is no answer where this is less than how much higher no answer scores than the best one. Default:
    tuned on the validation set where that has questions without an answer; else there always is one.
    """


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceFlags:
    """Multiple choice"""

    question_column: str = "question"
    """Column of the question. Rows as RACE has them (questions, options, answers: lists) are taken apart."""
    article_column: str | None = "article"
    """Column of the text that the question is about; none where there is none."""
    options_column: str = "options"
    """Column of the list of choices."""
    answer_column: str = "answer"
    """Column of the right one: its number from 0, its letter, or its text."""


@dataclass(frozen=True, kw_only=True)
class RankingFlags:
    """Answer selection and retrieval"""

    k: int | None = field(default=None, metadata={"alias": "-k"})
    """answer_selection: candidates that one row holds, scored together. Default: each candidate alone. retrieval: 2."""
    classification_head_type: Literal["IE_1", "IE_k", "AE_1", "AE_k", "RE_k"] = "RE_k"
    """With k, what the scores are read from (h_0 is the first token of the query, h_j that of candidate j): RE_k h_0,
    for all candidates at once; IE_k h_j; AE_k h_0 and h_j; IE_1 h_0 and AE_1 the sum of all, one score for the row.
    """
    separated: bool = False
    """With k: every text has its own max_sequence_length tokens, in place of all in one."""
    pad_to_k: bool = False
    """With k: queries with fewer candidates are filled up; otherwise they are an error."""
    grouping: Literal["fixed", "random"] = "fixed"
    """With k: rows of k candidates in the order of the data, or drawn anew for every epoch."""
    selection: Literal["best", "worst"] | None = None
    """With k: take the k candidates of a query that are best (highest) or worst by scores_column, in place of all."""
    scores_column: str | None = None
    """With selection: column of the scores."""
    extended_token_type_ids: tuple[int, ...] | None = None
    """Token type of each text, in place of the tokenizer's own."""
    metrics_empty_target_action: Literal["skip", "neg", "pos", "error"] = "skip"
    """What a query without a right answer counts: nothing, 0, 1, or an error."""
    loss_fn: Literal[
        "contrastive_loss", "online_contrastive_loss", "cosine_similarity_loss", "in_batch_negatives_loss"
    ] = "contrastive_loss"
    """retrieval: the loss. in_batch_negatives_loss takes the other rows' texts as wrong answers."""
    scores_fn: Literal["cosine_similarity", "dot_product_similarity"] = "cosine_similarity"
    """retrieval: how two embeddings are compared."""
    pooling: Literal["mean", "cls"] = "mean"
    """retrieval: the embedding of a text is the mean of its tokens, or the first one."""
    margin: float = 0.5
    """retrieval: distance from which on a wrong pair costs nothing in the contrastive losses."""
    temperature: float = 0.05
    """retrieval: divides the scores in in_batch_negatives_loss."""
    sync_devices: bool = False
    """retrieval: the texts of all processes are each other's negatives."""


@dataclass(frozen=True, kw_only=True)
class DenoisingFlags:
    """Denoising"""

    denoising_objective: Literal["auto", "infilling", "span_corruption"] = "auto"
    """infilling puts one mask for each span of tokens, the target is the whole text (BART); span_corruption puts
    sentinels, the target is what they stand for (T5). auto: span_corruption where the tokenizer has <extra_id_0>.
    """
    mean_span_length: float = 3.0
    """Mean length of a span in tokens; of infilling it is that of a Poisson distribution, so some are empty."""
    max_number_of_spans: int | None = None
    """Most spans of a text. Default: as many as come; of span_corruption as many as there are sentinels."""
    whole_word_denoising: bool = False
    """Count and cut in words, not in tokens."""
    shuffle_sentences: bool = False
    """infilling: shuffle the sentences of the text first; they end with full stops."""
    closing_sentinel: bool = False
    """span_corruption: one sentinel more at the end of the target."""


@dataclass(frozen=True, kw_only=True)
class SummarizationFlags:
    """Summarization"""

    document_column: tuple[str, ...] = ("document",)
    """Column of the text, or several, as in input_columns: +sentences joins a list."""
    summary_column: str = "summary"
    """Column of the text to write; of a list, *a, the first is learned and all are references. Missing or null where
    there is none.
    """
    additional_summaries_column: tuple[str, ...] = ()
    """Columns with more references, for the scores; rows may lack them. Of a row without summary_column the first one
    is learned: so a test set may name its references as it likes.
    """
    prefix: str = ""
    """What is put before each text, such as "summarize: "."""
    max_target_length: int = 128
    """Longest text to write, in tokens, special ones included; longer ones lose their end."""
    valid_generation: bool = True
    """Let the model write in validation too; otherwise that has the loss alone, and is quick."""
    valid_bert_score: bool = False
    """Take BERTScore in validation; it is slow, and every process takes it."""
    test_bert_score: bool = False
    """Take BERTScore in test and prediction."""
    bert_score_model: str = "roberta-large"
    """Encoder for BERTScore: a folder, or a name on the hub."""
    bert_score_layer: int = 17
    """The layer of it whose hidden states are compared; 17 is the usual one of roberta-large."""
    max_multi_token_predictions: int | None = None
    """summarization and denoising: tokens that one state of the decoder says, where it is more than the next one."""


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """Writing of texts; where nothing is given, as the model's generation_config.json says"""

    generation_max_length: int | None = None
    """Longest text in tokens, with the one that the decoder begins with. Default: max_target_length and that one."""
    generation_max_new_tokens: int | None = None
    """Longest text in tokens, without it."""
    generation_min_length: int | None = None
    """Shortest text in tokens, with it."""
    generation_min_new_tokens: int | None = None
    """Shortest text in tokens, without it."""
    generation_num_beams: int | None = None
    """Beams; 1 takes the likeliest token each time."""
    generation_length_penalty: float | None = None
    """With beams: more than 0 favours long texts, less than 0 short ones."""
    generation_early_stopping: bool = False
    """With beams: stop as soon as there are as many whole texts as beams."""
    generation_no_repeat_ngram_size: int | None = None
    """No sequence of so many tokens comes twice."""
    generation_encoder_no_repeat_ngram_size: int | None = None
    """No sequence of so many tokens of the document is written."""
    generation_repetition_penalty: float | None = None
    """More than 1 makes tokens that were written already less likely."""
    generation_do_sample: bool = False
    """Draw tokens, by the seed, in place of taking the likeliest."""
    generation_temperature: float | None = None
    """With do_sample: divides the logits."""
    generation_top_k: int | None = None
    """With do_sample: from so many likeliest tokens; 0 from all. Where the model does not say, it is 50."""
    generation_top_p: float | None = None
    """With do_sample: from the likeliest tokens that have this share together."""
    generation_typical_p: float | None = None
    """With do_sample: from the most typical tokens that have this share together."""
    generation_renormalize_logits: bool = False
    """Make the scores probabilities again after all of these."""
    generation_suppress_tokens: tuple[int, ...] | None = None
    """Ids that are never written."""
    generation_begin_suppress_tokens: tuple[int, ...] | None = None
    """Ids that are not written at the beginning."""
    generation_bad_words_ids: tuple[str, ...] | None = None
    """Words that are never written: the ids of each, with commas where it has several, as in 17 5,99."""


# Options of generation that people look for, and what there is in their place.
_GROUPS = "transformers 5 has no groups of beams: give --generation_num_beams, or --generation_do_sample for variety"
GENERATION_ELSEWHERE = {
    "generation_max_time": "what is written may not depend on the machine: limit it by --generation_max_new_tokens",
    "generation_num_return_sequences": "one text is written for each row, the best of --generation_num_beams",
    "generation_num_beam_groups": _GROUPS,
    "generation_diversity_penalty": _GROUPS,
    "generation_penalty_alpha": "transformers 5 has no contrastive search: give --generation_do_sample and "
    "--generation_top_k or --generation_typical_p",
    "generation_force_words_ids": "transformers 5 has no constrained beams; --generation_bad_words_ids and "
    "--generation_suppress_tokens forbid words",
    "generation_forced_decoder_ids": "the model's generation_config.json says how texts begin: decoder_start_token_id, "
    "and forced_bos_token_id after it",
    **dict.fromkeys(
        ("valid_bleurt_score", "test_bleurt_score"),
        "BLEURT is in no package of an index: --valid_bert_score and --test_bert_score compare by an encoder too",
    ),
}


@dataclass(frozen=True, kw_only=True)
class WeightFlags:
    """Weights of the losses of a mixture of tasks"""

    masked_lm_weight: float = 1.0
    """Weight of masked_lm."""
    seq_class_weight: float = 1.0
    """Weight of seq_class."""
    token_class_weight: float = 1.0
    """Weight of token_class."""
    answer_selection_weight: float | None = None
    """Weight of answer_selection. Default: seq_class_weight."""
    question_answering_weight: float = 1.0
    """Weight of question_answering."""
    multiple_choice_weight: float = 1.0
    """Weight of multiple_choice."""
    retrieval_weight: float = 1.0
    """Weight of retrieval."""
    token_detection_weight: float = 50.0
    """Weight of the discriminator's loss in electra; the generator's has masked_lm_weight, in electra alone too."""
    sentence_order_weight: float = 1.0
    """Weight of sentence_order."""
    random_token_detection_weight: float = 1.0
    """Weight of random_token_detection."""
    cluster_random_token_detection_weight: float = 1.0
    """Weight of cluster_random_token_detection."""


TASK_GROUPS: tuple[tuple[str, type, tuple[str, ...]], ...] = tuple(
    (str(cls.__doc__), cls, ())
    for cls in (
        *(
            ColumnFlags,
            MaskedLMFlags,
            DetectionFlags,
            TokenFlags,
            QuestionAnsweringFlags,
            MultipleChoiceFlags,
            RankingFlags,
            DenoisingFlags,
            SummarizationFlags,
            GenerationFlags,
        ),
        WeightFlags,
    )
)

_MASKING = (
    *("probability", "probability_masked", "probability_replaced", "probability_unchanged"),
    *("whole_word_masking", "exact_masking"),
)
# How masked_lm, electra and their kind make examples of texts.
BLOCKS = ("input_columns", "input_column", "packing", "across_documents", "sentence_pairs", "short_pairs")
_TEXTS = (*BLOCKS, "tokenized_dir", "prepare_data_workers")
_DETECTION = ("probability", "whole_word_detection", "exact_masking", *_TEXTS)
_LABELS = ("label_column", "num_labels", "label_weights", "label_smoothing")
WITH_K = ("classification_head_type", "separated", "pad_to_k", "grouping", "selection", "scores_column")
_GENERATION = tuple(GenerationFlags.__dataclass_fields__)
_TOKEN_CLASS = ("input_column", "input_columns", *_LABELS, "label_scheme", "token_class_weight")

# Where each task is written, and the flags that it reads.
TASKS: dict[str, tuple[str, frozenset[str]]] = {
    "seq_class": (
        "funneltfm.tasks.seq_class:SeqClass",
        frozenset({*_LABELS, "input_columns", "input_column", "regression", "extended_token_type_ids"})
        | {"seq_class_weight"},
    ),
    "token_class": ("funneltfm.tasks.token_class:TokenClass", frozenset(_TOKEN_CLASS)),
    "question_answering": (
        "funneltfm.tasks.question_answering:QuestionAnswering",
        frozenset({"query_column", "context_column", "answers_column", "label_column", "doc_stride"})
        | {"max_query_length", "max_answer_length", "n_best_size", "null_threshold", "question_answering_weight"},
    ),
    "multiple_choice": (
        "funneltfm.tasks.multiple_choice:MultipleChoice",
        frozenset({"question_column", "article_column", "options_column", "answer_column", "label_smoothing"})
        | {"multiple_choice_weight"},
    ),
    "answer_selection": (
        "funneltfm.tasks.answer_selection:AnswerSelection",
        frozenset({"k", *WITH_K, "input_columns", "label_column", "index_column", "label_weights", "label_smoothing"})
        | {"extended_token_type_ids", "metrics_empty_target_action", "answer_selection_weight", "seq_class_weight"},
    ),
    "retrieval": (
        "funneltfm.tasks.retrieval:Retrieval",
        frozenset({"input_columns", "label_column", "index_column", "k", "metrics_empty_target_action", "loss_fn"})
        | {"scores_fn", "pooling", "margin", "temperature", "sync_devices", "retrieval_weight"},
    ),
    "masked_lm": (
        "funneltfm.tasks.masked_lm:MaskedLM",
        frozenset({*_MASKING, *_TEXTS, "masked_lm_weight"}),
    ),
    "sentence_order": (
        "funneltfm.tasks.sentence_order:SentenceOrder",
        frozenset({*_TEXTS, "sentence_order_weight"}),
    ),
    "random_token_detection": (
        "funneltfm.tasks.token_detection:RandomTokenDetection",
        frozenset({*_DETECTION, "random_token_detection_weight"}),
    ),
    "cluster_random_token_detection": (
        "funneltfm.tasks.token_detection:ClusterRandomTokenDetection",
        frozenset({*_DETECTION, "clusters_filename", "beta", "update_only_on_predictions"})
        | {"cluster_random_token_detection_weight"},
    ),
    "electra": (
        "funneltfm.tasks.electra:Electra",
        frozenset({*_MASKING, *_TEXTS, "masked_lm_weight", "token_detection_weight"})
        | {"sample_function", "embedding_sharing", "tie_generator_discriminator_embeddings", "generator_size"}
        | {"pre_trained_generator_config", "pre_trained_generator_model"},
    ),
    "denoising": (
        "funneltfm.tasks.denoising:Denoising",
        frozenset(DenoisingFlags.__dataclass_fields__)
        | {"probability", "input_columns", "input_column", "packing", "across_documents", "tokenized_dir"}
        | {"prepare_data_workers", "max_multi_token_predictions"},
    ),
    "summarization": (
        "funneltfm.tasks.summarization:Summarization",
        frozenset({*SummarizationFlags.__dataclass_fields__, *_GENERATION, "label_smoothing"}),
    ),
}
ALIASES = {
    "pos_tagging": "token_class",
    "named_entity_recognition": "token_class",
    "token_detection_and_masked_lm": "electra",
    "token_detection_and_masked_lm_and_seq_class": "electra+seq_class",
    "masked_lm_and_seq_class": "masked_lm+seq_class",
    "masked_lm_and_answer_selection": "masked_lm+answer_selection",
    "masked_lm_and_token_class": "masked_lm+token_class",
}


def task_names(pipeline: str) -> list[str]:
    """The tasks of a pipeline: one name, several joined by +, or an older name.

    >>> task_names("masked_lm_and_seq_class"), task_names("pos_tagging")
    (['masked_lm', 'seq_class'], ['token_class'])
    """
    names = [ALIASES.get(name, name) for name in ALIASES.get(pipeline, pipeline).split("+")]
    for name in names:
        if name not in TASKS:
            raise InputError(
                f"pipeline {pipeline!r}: there is no task {name!r}. The tasks are {', '.join(TASKS)}; several are "
                f"joined with +, and {', '.join(ALIASES)} are other names."
            )
    if len(set(names)) < len(names):
        raise InputError(f"pipeline {pipeline!r} names a task twice.")
    return names


_OWN: dict[str, Callable[[str], Any]] = {
    "label_column": str,
    "num_labels": int,
    "label_weights": lambda text: tuple(map(float, text.split(","))),
}


def own_flags(words: Sequence[str], pipeline: str) -> dict[str, dict[str, Any]]:
    """--task_flags: what each task of a pipeline has for itself.

    >>> own_flags(["seq_class.num_labels=3"], "seq_class+token_class")
    {'seq_class': {'num_labels': 3}, 'token_class': {}}
    """
    own: dict[str, dict[str, Any]] = {name: {} for name in task_names(pipeline)}
    may = [f"{name}.{flag}" for name in own for flag in _OWN if flag in TASKS[name][1]]
    if words and len(own) == 1:
        raise InputError(f"--task_flags tells the tasks of a mixture apart, and there is {pipeline} alone.")
    for word in words:
        left, _, text = word.partition("=")
        task, _, flag = left.partition(".")
        task = ALIASES.get(task, task)
        try:
            if f"{task}.{flag}" not in may or flag in own[task] or not text:
                raise ValueError
            own[task][flag] = _OWN[flag](text)
        except ValueError:
            raise InputError(
                f"--task_flags takes NAME=VALUE, each name once, of {', '.join(may) or 'tasks with labels'} (text, a "
                f"whole number, numbers with commas); got {word!r}."
            ) from None
    return own


def check_task_flags(names: Sequence[str], given: frozenset[str]) -> None:
    """An InputError for a task's flag that was given and that no task of the pipeline reads."""
    known = frozenset[str]().union(*(reads for _, reads in TASKS.values()))
    read = frozenset[str]().union(*(TASKS[name][1] for name in names))
    for flag in sorted((given & known) - read):
        readers = [name for name, (_, reads) in TASKS.items() if flag in reads]
        raise InputError(f"--{flag} is read by {', '.join(readers)}, not by {'+'.join(names)}. Leave it out.")
    weights = sorted(flag for flag in given & known if flag.endswith("_weight"))
    if weights and len(names) == 1 and names[0] != "electra":  # which has two losses by itself
        raise InputError(f"--{weights[0]} weighs the losses of several tasks, and there is {names[0]} alone.")
