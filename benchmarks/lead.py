"""The first sentences of each text taken for its summary: the scores that a trained model has to beat.

    python benchmarks/lead.py scitldr/test.jsonl --document_column +source --summary_column '*target'

Columns and scores are those of the pipeline `summarization`.
"""

import argparse

from funneltfm.data.sources import open_rows
from funneltfm.summaries import rouge, sacrebleu, sentences
from funneltfm.tasks.summarization import Summarization
from funneltfm.training.train_config import make_train_args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data")
    parser.add_argument("--document_column", nargs="+")
    parser.add_argument("--summary_column")
    parser.add_argument("--additional_summaries_column", nargs="+")
    flags = vars(parser.parse_args())

    rows = open_rows(flags.pop("data"))
    task = Summarization(make_train_args(pipeline="summarization", **flags))
    documents = ["\n".join(map(str, texts)) for texts in task.texts(rows, rows.name)]
    references = [task.references(row, f"{rows.name}, row {number}") for number, row in enumerate(rows, 1)]
    print("| sentences | ROUGE-1 | ROUGE-2 | ROUGE-L | BLEU |\n|---|---|---|---|---|")
    for n in (1, 3):
        said = [" ".join(sentences(document)[:n]) for document in documents]
        found = rouge(said, references)
        cells = [f"{found[f'{kind}_fmeasure']:.3f}" for kind in ("rouge1", "rouge2", "rougeL")]
        print(f"| {n} | {' | '.join(cells)} | {sacrebleu(said, references):.1f} |")


if __name__ == "__main__":
    main()
