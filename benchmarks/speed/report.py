"""Tables, JSON, plots."""

import argparse
import datetime
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(flags: argparse.Namespace) -> dict[str, Any]:
    facts = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    if flags.device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def path_of(name: str, flags: argparse.Namespace) -> Path:
    """benchmarks/results/DATE-NAME-SIZES-HARDWARE.json, unless --out says otherwise."""
    if flags.out:
        return flags.out
    facts = machine(flags)
    hardware = facts.get("gpu") or f"{facts['cpu']} {facts['threads']} threads"
    sizes = " ".join(flags.sizes) if "--sizes" in flags.words else ""  # so that no part of a case replaces another
    words = f"{datetime.date.today().isoformat()} {name} {sizes} {hardware}"
    return RESULTS / (re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower() + ".json")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as text. columns: key -> format, such as ".3f"; what a row lacks stays empty."""
    cells = [list(columns)]
    cells += [
        [format(row[key], form) if row.get(key) is not None else "" for key, form in columns.items()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write(path: Path, name: str, flags: argparse.Namespace, result: dict[str, Any]) -> None:
    settings = {key: value for key, value in vars(flags).items() if key not in ("words", "out", "child")}
    settings |= {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    whole = {
        "benchmark": Path(sys.argv[0]).stem,
        "case": name,
        "date": datetime.date.today().isoformat(),
        "settings": settings,
    }
    whole |= {"machine": machine(flags)} | result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")


def plot(path: Path, rows: list[dict[str, Any]], panels: dict[str, str], over: str | None = None) -> None:
    """One panel a number: bars by contender, or lines over the number `over` (both axes logarithmic)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {key: label for key, label in panels.items() if any(row.get(key) is not None for row in rows)}
    groups = list(dict.fromkeys(row.get("size") for row in rows)) if over is None else [None]
    height = 4.5 if over else 1 + 0.32 * max(sum(row.get("size") == group for row in rows) for group in groups)
    figure = Figure(figsize=(5.5 * len(panels), height * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, group in zip(figure.subplots(len(groups), len(panels), squeeze=False), groups, strict=True):
        for axes, (key, label) in zip(line, panels.items(), strict=True):
            chosen = [row for row in rows if row.get(key) is not None and (over or row.get("size") == group)]
            if over is None:
                names = [row["contender"] for row in chosen]
                bars = axes.barh(range(len(chosen)), [row[key] for row in chosen])
                axes.bar_label(bars, fmt="%.3g", padding=2)
                axes.set_yticks(range(len(names)), names)
                axes.invert_yaxis()
                axes.margins(x=0.15)
                axes.set(xlabel=label, title=group or "")
                continue
            for name in dict.fromkeys(row["contender"] for row in chosen):
                points = [(row[over], row[key]) for row in chosen if row["contender"] == name]
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel=over, ylabel=label)
            axes.set_xticks(ticks := sorted({row[over] for row in chosen}), [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
