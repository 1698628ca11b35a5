"""Predictions as files: jsonl for people and programs, tsv for GLUE's server."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from funneltfm.data.encoding import EncodedSplit
from funneltfm.files import atomic_path
from funneltfm.tasks.classification import Classification


def write_predictions(
    task: Classification, split: str, encoded: EncodedSplit, logits: np.ndarray, folder: Path
) -> list[Path]:
    """Write `SPLIT.jsonl` (id, prediction, scores by class, label where known) and, for a GLUE test set, its
    submission file.

    logits: (N, C) in the order of the split. Returns the paths written.
    """
    pred = task.predict(logits)
    names = [task.label_name(value) for value in pred]
    scores = None if task.regression else softmax(logits.astype(np.float64), axis=-1)
    paths = [folder / f"{split}.jsonl"]
    with atomic_path(paths[0]) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for i, name in enumerate(names):
            row: dict = {"id": str(encoded.ids[i]), "prediction": float(name) if task.regression else name}
            if scores is not None and task.spec.labels is not None:
                row["scores"] = dict(zip(task.spec.labels, scores[i].round(6).tolist(), strict=True))
            if encoded.labelled:
                row["label"] = float(encoded.labels[i]) if task.regression else task.label_name(encoded.labels[i])
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    if file_name := task.spec.submission.get(split):
        paths.append(folder / file_name)
        with atomic_path(paths[1]) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            writer.writerow(["index", "prediction"])
            # The server takes STS-B between 0 and 5.
            values = [f"{min(5.0, max(0.0, p)):.3f}" for p in pred] if task.regression else names
            writer.writerows(zip(encoded.ids, values, strict=True))
    return paths


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write jsonl: a row a line."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
