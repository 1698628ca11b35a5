"""Write the built-in sample: short reviews whose author's own verdict is to be found, positive or negative.

    python data-scripts/make_sample.py FOLDER

It writes train.jsonl, valid.jsonl, test.jsonl (keys text_a, label) and vocab.txt (WordPiece pieces learned from train).
The same seed writes the same bytes.

Half of the reviews hold one praising and one blaming word: what somebody expected, heard or saw at first, and what
the author found. Which of the two counts is said by the sentence's structure alone ("we expected X, but it was Y",
"it was Y, although it looked X", with or without "not"), so the words without their order say nothing. The rest are
plain ("the soup was not bland") and teach what the words mean.
"""

import argparse
import io
import json
import random
import re
from pathlib import Path

PRAISE = """
wonderful delicious charming brilliant splendid delightful superb excellent lovely gorgeous marvellous
pleasant impressive elegant
""".split()
BLAME = """
awful bland dreary clumsy dismal dreadful terrible mediocre ugly shabby horrible annoying disappointing
tasteless
""".split()
THINGS = """
soup hotel novel concert museum garden lecture film bakery bridge market exhibition play dessert train lounge
beach cottage festival menu podcast opera game castle trail
""".split()
DETAILS = ["", "", "", "little ", "famous ", "old ", "new ", "second ", "local ", "small "]
DETERMINERS = ["the", "this", "their", "our", "that"]
PEOPLE = ["we", "everyone", "my sister", "the critics", "his friends", "the guide", "our neighbours", "most visitors"]
TIMES = ["", "", "", "last week", "in spring", "on sunday", "this year", "after the repairs", "in the end"]
NOT = ["not", "hardly", "never", "far from"]

# {it} is the thing, {who} somebody, {heard} the phrase that does not count, {found} the verdict.
PLAIN = ["{it} was {found} {when}", "{when} {it} was {found}", "{who} found {it} {found} {when}", "{it} is {found}"]
MIXED = [
    "{who} expected {it} to be {heard} , but it was {found} {when}",
    "{it} was {found} {when} , although {who} expected it to be {heard}",
    "{who} called {it} {heard} , but i found it {found} {when}",
    "i found {it} {found} {when} , but {who} called it {heard}",
    "{it} looked {heard} at first , yet it turned out {found} {when}",
    "{it} turned out {found} {when} , though it looked {heard} at first",
    "{it} used to be {heard} ; now it is {found}",
    "{it} is {found} now ; it used to be {heard}",
    "{when} {who} said {it} would be {heard} and they were wrong : it was {found}",
]


def sentence(rng: random.Random) -> tuple[str, str]:
    """One review and its label."""
    label = rng.choice(["negative", "positive"])
    negated = rng.random() < 0.3
    good = (label == "positive") != negated  # whether the verdict's word, without its "not", is one of praise
    found, heard = (rng.choice(PRAISE), rng.choice(BLAME)) if good else (rng.choice(BLAME), rng.choice(PRAISE))
    if rng.random() < 0.3:  # means nothing for the label, so that "not" alone gives nothing away
        heard = f"{rng.choice(NOT)} {heard}"
    text = rng.choice(PLAIN if rng.random() < 0.5 else MIXED).format(
        it=f"{rng.choice(DETERMINERS)} {rng.choice(DETAILS)}{rng.choice(THINGS)}",
        who=rng.choice(PEOPLE),
        when=rng.choice(TIMES),
        heard=heard,
        found=f"{rng.choice(NOT)} {found}" if negated else found,
    )
    text = " ".join(text.split()).replace(" ,", ",").replace(" ;", ";").replace(" :", ":")
    return text[0].upper() + text[1:] + ".", label


def write_sample(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write every split, no sentence twice, and the vocabulary."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    train: list[str] = []
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            text, label = sentence(rng)
            if text not in seen:
                seen.add(text)
                rows.append({"text_a": text, "label": label})
        train = train or [row["text_a"] for row in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    pieces = word_pieces(train, vocab_size=400)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


def word_pieces(texts: list[str], vocab_size: int) -> list[str]:
    """A WordPiece vocabulary learned from the texts: special symbols, characters at the start of a word and
    within, frequent pieces.

    Learned by SentencePiece, whose result is the same every time (the trainer of `tokenizers` breaks ties at random).
    """
    import sentencepiece

    words = [" ".join(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=vocab_size, model_type="bpe", num_threads=1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    learned = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    pieces = [piece[1:] if piece.startswith("\u2581") else f"##{piece}" for piece in learned]
    characters = sorted(set("".join(words)) - {" "})
    special = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
    return [*dict.fromkeys([*special, *characters, *(f"##{c}" for c in characters), *filter(None, pieces)])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the built-in sample data set.")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--train", type=int, default=4000, help="training sentences (default: 4000)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default: 1)")
    args = parser.parse_args()
    write_sample(args.folder, {"train": args.train, "valid": 1000, "test": 1000}, args.seed)


if __name__ == "__main__":
    main()
