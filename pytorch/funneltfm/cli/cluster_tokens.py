"""`funneltfm cluster-tokens MODEL -o clusters.txt`: the tokens of a model in clusters, for --clusters_filename."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from funneltfm.cli.flags import FlagParser
from funneltfm.errors import InputError, brief
from funneltfm.files import write_text


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Clusters"""

    clusters: int = field(default=100, metadata={"alias": "-k"})
    """How many there are."""
    seed: int = 0
    """Seed of k-means."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("Clusters", ClusterFlags, ())],
        prog="funneltfm cluster-tokens",
        usage="funneltfm cluster-tokens [flags] -o FILE MODEL",
        description="Put the tokens of a model into clusters by their embeddings (k-means): a line a token, by its id.",
        config_file=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint of transformers: a folder, or a name on the hub")
    parser.add_argument("-o", "--output", required=True, help="file to write")
    flags, _ = parser.parse(argv)
    source, output, n = flags["model"], flags["output"], flags["clusters"]

    if not 0 <= flags["seed"] < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}; got {flags['seed']}.")

    import numpy as np
    from sklearn.cluster import KMeans

    try:
        import transformers

        model = transformers.AutoModel.from_pretrained(source)
    except Exception as error:  # transformers and the hub raise all kinds
        raise InputError(
            f"{source} cannot be loaded: {brief(' '.join(str(error).split()), 400)} Give a folder with a config.json "
            f"and weights, or a name on the hub."
        ) from error
    table = model.get_input_embeddings().weight.detach().float().numpy()
    if not 1 <= n <= len(table):
        raise InputError(f"clusters must be from 1 to {len(table)}, the tokens of {source}; got {n}.")
    cluster = KMeans(n, random_state=flags["seed"]).fit_predict(table)
    write_text(Path(output), "".join(f"{number}\n" for number in cluster))
    sizes = np.bincount(cluster)
    print(f"{output}: {len(cluster)} tokens in {n} clusters of {sizes.min()} to {sizes.max()}")
