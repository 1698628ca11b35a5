"""`funneltfm convert-ckpt SRC DST`: Funnel checkpoints between TensorFlow, the original PyTorch code and
transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from funneltfm.cli.flags import FlagParser


@dataclass(frozen=True, kw_only=True)
class ConvertFlags:
    """Conversion"""

    from_: Literal["auto", "tf", "pt", "hf", "funneltfm"] = "auto"
    """Format of the source: TensorFlow, model.pt of the original, transformers' Funnel, or our own FunnelTFMFor...
    folders.
    auto looks at the files."""
    to: Literal["pt", "hf", "funneltfm", "tf"] = "pt"
    """Format of the target."""
    net_config: str | None = None
    """The source's config (JSON), where it does not lie beside the checkpoint."""
    truncate_seq: bool = True
    """For configs that do not say: whether the model drops a token before pooling. The published models do."""
    attn_type: Literal["rel_shift", "factorized"] = "rel_shift"
    """For configs that do not say: how the position term is computed (the numbers are the same)."""
    drop_heads: bool = False
    """Leave out heads and generator, which transformers' Funnel may not be able to hold."""
    overwrite: bool = False
    """Replace the target if it exists."""
    verify: bool = False
    """Run the same random input through transformers' model and ours and compare (where one side is hf)."""
    tf_python: str | None = None
    """A Python that has TensorFlow, where this one has not. Default: the environment's FUNNELTFM_TF_PYTHON."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("Conversion", ConvertFlags, ())],
        prog="funneltfm convert-ckpt",
        usage="funneltfm convert-ckpt [flags] SRC DST",
        description="Convert a Funnel checkpoint. Every tensor is accounted for, or named as left out.",
        config_file=False,
    )
    parser.add_argument("source", help="checkpoint folder, model.pt, or prefix of a TensorFlow checkpoint")
    parser.add_argument("target", help="folder to write; it appears whole or not at all")
    flags, _ = parser.parse(argv)

    from funneltfm.funnel.formats import Options, convert_checkpoint, detect, verify

    source, target = Path(flags["source"]), Path(flags["target"])
    kind = detect(source) if flags["from"] == "auto" else flags["from"]
    parts, report = convert_checkpoint(
        source,
        target,
        to=flags["to"],
        kind=kind,
        config_path=Path(flags["net_config"]) if flags["net_config"] else None,
        options=Options(flags["attn_type"], flags["truncate_seq"], flags["tf_python"]),
        drop_heads=flags["drop_heads"],
        overwrite=flags["overwrite"],
    )
    print("\n".join(report))
    if flags["verify"]:
        folders = [path for path, name in ((source, kind), (target, flags["to"])) if name == "hf"]
        if not folders:
            print("verify: neither side is hf, so there is no second model to run; the tensors are bit-equal")
        for folder in folders:
            print(f"verify: {folder} in transformers and here differ by at most {verify(parts, folder):.1e}")
