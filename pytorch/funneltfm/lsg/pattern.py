"""A picture of what sees what in LSG attention."""

import os

import torch
from torch import Tensor

from funneltfm.errors import InputError
from funneltfm.files import atomic_path
from funneltfm.lsg.attention import lsg_attention
from funneltfm.lsg.settings import LSGSettings

NOTHING, LOCAL, SPARSE, GLOBAL = range(4)
COLOURS = {GLOBAL: ("global", "#d95f02"), LOCAL: ("local", "#1f78b4"), SPARSE: ("sparse", "#7fbf7b")}
LARGEST = 4096  # rows; a number for each pair of them is made


def attention_pattern(settings: LSGSettings, tokens: int, head: int = 0, causal: bool = False, seed: int = 0) -> Tensor:
    """How each row sees each: NOTHING, LOCAL, SPARSE or GLOBAL. uint8 (G + T, G + T), row = query.

    A summary is shown as the tokens it is made of. It is the attention itself that is asked: with queries of zero all
    weights are alike, and with one-hot values the output says whose they are. norm and lsh depend on the keys, which
    are random here.
    """
    rows = settings.num_global_tokens + tokens
    if tokens < 1 or rows > LARGEST:
        raise InputError(f"a picture has at least 1 and at most {LARGEST} rows, got {rows}. Choose another length.")
    if head < 0:
        raise InputError(f"head must be at least 0, got {head}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keys = torch.randn(1, head + 1, rows, rows)
        values = torch.eye(rows).expand_as(keys)
        weights = lsg_attention(torch.zeros_like(keys), keys, values, settings, causal=causal)[0, :, head]
    ahead, block = settings.num_global_tokens, settings.block_size
    seen = weights > 0
    pattern = torch.where(seen, SPARSE, NOTHING).to(torch.uint8)
    at = torch.arange(tokens)
    near = (at[:, None] // block - at // block).abs() <= 1
    pattern[ahead:, ahead:][near & seen[ahead:, ahead:]] = LOCAL
    pattern[:ahead] = GLOBAL * (not causal)
    pattern[ahead:, :ahead] = GLOBAL
    return pattern


def draw_pattern(pattern: Tensor, settings: LSGSettings, path: str | os.PathLike[str]) -> None:
    """A picture of `attention_pattern`, in the format that the path's ending says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ["#ffffff", *(COLOURS[kind][1] for kind in (LOCAL, SPARSE, GLOBAL))]
    axes.imshow(pattern.numpy(), cmap=ListedColormap(colours), vmin=NOTHING, vmax=GLOBAL, interpolation="nearest")
    sparse = "no sparse tokens"
    if settings.has_sparse:
        sparse = (
            f"{settings.sparse_block_size} {settings.sparsity_type} on either side, factor {settings.sparsity_factor}"
        )
    axes.set_title(f"LSG: blocks of {settings.block_size}; {sparse}; {settings.num_global_tokens} global", fontsize=10)
    axes.set_xlabel("is seen")
    axes.set_ylabel("sees")
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    supported = canvas.get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".")
    if ending not in supported:
        raise InputError(
            f"a picture's name must end in one of {', '.join(sorted(supported))}, got {os.fspath(path)!r}."
        )
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "lsg"}):
        figure.savefig(temporary, dpi=150)
