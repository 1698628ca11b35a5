"""One file of everything an LSG model needs, for folders that are loaded with `trust_remote_code=True`."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from funneltfm import __version__
from funneltfm.lsg import models

SOURCES = ("errors", *(f"lsg/{name}" for name in ("settings", "selection", "attention", "layer", "models")))
# ^ each after those it imports


@cache
def remote_code() -> str:
    """The sources of `SOURCES` in one module: each module's imports come first in it, so what follows them is joined.

    The name under which the file registers its attention has a digest of its content, so that folders written by other
    versions, and the package itself, can be used beside it.
    """
    imports, bodies = set(), []
    for name in SOURCES:
        text = (Path(models.__file__).parents[1] / f"{name}.py").read_text(encoding="utf-8")
        docstring, *rest = ast.parse(text).body
        head = [node for node in rest if isinstance(node, ast.Import | ast.ImportFrom)]
        imports |= {line for line in map(ast.unparse, head) if "funneltfm" not in line}
        last = head[-1].end_lineno if head else docstring.end_lineno
        bodies.append("\n".join(text.splitlines()[last:]).strip())
    body = "\n\n\n".join(bodies)
    given = f'ATTENTION = "{models.ATTENTION}"'
    assert given in body, "models.py no longer says how its attention is called"
    body = body.replace(given, f'ATTENTION = "lsg-{hashlib.sha256(body.encode()).hexdigest()[:8]}"')
    about = f'"""LSG models (Condevaux and Harispe, 2022) without the package; written by funneltfm {__version__}."""'
    return "\n".join([about, "", *sorted(imports), "", body, ""])
