"""`funneltfm VERB ...`. One verb a file; a verb is imported when it is called, so that `--help` is quick."""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence

from funneltfm.errors import InputError, Stopped, brief

VERBS = {
    "classify": "finetune a Funnel-Transformer on text classification",
    "train": "train any encoder on any pipeline: tagging, ranking, question answering, masked LM, ...",
    "predict": "predict with a model that `train` has left, to jsonl",
    "train-tokenizer": "learn a WordPiece, BPE or Unigram tokenizer from texts",
    "cluster-tokens": "put the tokens of a model into clusters, for detecting replaced ones",
    "curves": "draw the scores of a run over its steps",
    "run": "run named experiments: pretraining, sparse training, GLUE",
    "export": "write a finetuned model so that transformers serves it without this package",
    "convert-ckpt": "convert Funnel checkpoints between TensorFlow, PyTorch and transformers",
    "convert-lsg": "make an LSG model, for long texts, of a checkpoint of transformers",
    "lsg-pattern": "draw what sees what in LSG attention",
    "batch-size": "find the largest training batch that fits, for models and lengths",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0, 1 for input that cannot be used, 2 for flags that cannot be understood, 3 for
    training that diverged, 130 for Ctrl-C, 128 + n for signal n.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: funneltfm VERB [flags]\n\nverbs (`funneltfm VERB --help` lists the flags):")
        print("\n".join(f"  {verb:17}{what}" for verb, what in VERBS.items()))
        return 0 if argv else 2
    if argv[0] == "--version":
        from funneltfm import __version__

        print(f"funneltfm {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"funneltfm: error: no verb {verb!r}; the verbs are {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    _log_to_terminal()
    from funneltfm.cli.flags import BadFlag, FlagParser

    FlagParser.debug = False
    try:
        importlib.import_module(f"funneltfm.cli.{verb.replace('-', '_')}").main(rest)
    except (InputError, OSError) as error:
        if FlagParser.debug:
            raise
        print(f"funneltfm {verb}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadFlag) else getattr(error, "exit_code", 1)
    except (MemoryError, RuntimeError) as error:
        if FlagParser.debug or not _out_of_memory(error):
            raise
        print(
            f"funneltfm {verb}: error: out of memory ({brief(str(error), 300)}). Take a smaller batch, shorter texts "
            f"or a smaller model, or --gradient_checkpointing; `funneltfm batch-size` finds what fits.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        if str(error) or not isinstance(error, Stopped):
            print(f"\nfunneltfm {verb}: stopped. {error}".rstrip(), file=sys.stderr)
        return 128 + signum
    return 0


def _out_of_memory(error: BaseException) -> bool:
    """Of numpy, or of torch, which has an own class for it on GPUs alone."""
    told = ("allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)


class _TqdmHandler(logging.StreamHandler):
    """Writes to the present stderr, whatever it is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "in_bar", False):  # which shows it already
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        print(prefix + self.format(record), file=sys.stderr, flush=True)


def _log_to_terminal() -> None:
    logger = logging.getLogger("funneltfm")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_TqdmHandler())
