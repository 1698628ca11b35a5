"""Imports go down only (docs/architecture.md), and what should be light is light."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "pytorch"

# A module may import from its own floor and from those below. "data.*" is every module of a folder; the modules of
# `funnel` stand on two floors and are named one by one.
FLOORS = (
    (
        "errors",
        "files",
        "funnel",
        "funnel.config",
        "funnel.ops",
        "funnel.chunked",
        "funnel.attention",
        "funnel.heads",
        "funnel.model",
    ),
    (
        "funnel.checkpoints",
        "funnel.convert",
        "funnel.formats",
        "funnel.hf",
        "registration",
        "lsg.*",
        "sparse.*",
        "data.*",
    ),
    ("metrics", "ranking", "squad", "summaries", "tasks.*"),
    ("training.*", "experiments.*"),
    ("cli.*", "__main__"),
)


def module_of(path):
    """pytorch/funneltfm/data/readers.py -> data.readers; a folder's __init__.py is the folder; "" is the face."""
    parts = path.relative_to(SOURCE / "funneltfm").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in sorted((SOURCE / "funneltfm").rglob("*.py"))}


def floor_of(module):
    for floor, names in enumerate(FLOORS):
        for name in names:
            if module == name or (name.endswith(".*") and (module + ".").startswith(name.removesuffix("*"))):
                return floor
    return None


def imported(source):
    """Dotted names that a source imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}; imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def own(names):
    """The modules of this package among imported names; a name inside a module counts for the module."""
    found = set()
    for name in names:
        package, _, rest = name.partition(".")
        if package == "funneltfm":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def test_every_module_has_a_floor():
    unassigned = [module for module in MODULES if module and floor_of(module) is None]
    assert not unassigned, f"new modules: give each a floor in FLOORS of {Path(__file__).name}: {unassigned}"


@pytest.mark.parametrize("module", [module for module in MODULES if floor_of(module) is not None])
def test_imports_go_down(module):
    floor = floor_of(module)
    for other in own(imported(MODULES[module].read_text(encoding="utf-8"))) - {""}:
        assert floor_of(other) is not None, f"{module} imports {other}, which has no floor"
        assert floor_of(other) <= floor, f"{module} (floor {floor}) imports {other} (floor {floor_of(other)})"


def test_the_check_sees_imports_of_every_form():
    source = """
import funneltfm.cli.main
from funneltfm import metrics, __version__
from funneltfm.data.readers import get_dataset
def function():
    from funneltfm.training import classify
    importlib.import_module("funneltfm.funnel.ops")
    import numpy.linalg
"""
    assert own(imported(source)) == {"cli.main", "metrics", "", "data.readers", "training.classify", "funnel.ops"}
    assert "numpy.linalg" in imported(source)
    assert floor_of("funnel.model") == 0 < floor_of("funnel.checkpoints")
    assert floor_of("data") == floor_of("data.deep.er") == 1
    assert floor_of("dataset") is None
    assert floor_of("funnel.new") is None


def test_the_ground_floor_needs_torch_alone():
    for module in FLOORS[0]:
        packages = {name.partition(".")[0] for name in imported(MODULES[module].read_text(encoding="utf-8"))}
        assert packages - set(sys.stdlib_module_names) <= {"funneltfm", "torch"}, module


# ---- in a fresh process


def packages_after(code):
    """Top-level packages that are loaded, beside the standard library, after `code` ran in a fresh interpreter."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    return {name for name in loaded - set(sys.stdlib_module_names) if not name.startswith("__editable__")}


def test_importing_the_package_is_free():
    bare = packages_after("")
    assert packages_after("import funneltfm; dir(funneltfm)") - bare == {"funneltfm"}


def test_the_model_needs_torch_alone():
    use = """
import modeling
modeling.FunnelTFM(modeling.ModelConfig(d_model=8, d_embed=8, n_head=1, d_head=8, d_inner=8, vocab_size=9))
"""
    assert packages_after(use) - packages_after("import torch") == {"funneltfm", "modeling"}


def test_sparse_training_needs_torch_and_numpy_alone():
    bare = packages_after("import torch, numpy, safetensors.torch")
    code = "import torch, funneltfm.sparse as s; s.attach(torch.nn.Linear(4, 4), s.SparsityConfig(sparsity=0.5))"
    assert packages_after(code) - bare == {"funneltfm"}


def test_help_of_the_command_loads_no_torch():
    code = """
import contextlib, io
from funneltfm.cli.main import VERBS, main
with contextlib.redirect_stdout(io.StringIO()) as out:
    for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
        try:
            assert main(arguments) == 0
        except SystemExit as end:
            assert not end.code
assert "usage" in out.getvalue()
"""
    loaded = packages_after(code)
    assert "funneltfm" in loaded
    assert not loaded & {"torch", "lightning", "transformers", "sklearn", "scipy", "matplotlib", "datasets"}


# ---- the face


def test_the_face_resolves():
    import funneltfm

    for name in funneltfm.__all__:
        value = getattr(funneltfm, name)
        home = importlib.import_module(funneltfm._FACE[name])
        assert value is getattr(home, name)
        assert name in dir(funneltfm)
        assert floor_of(funneltfm._FACE[name].removeprefix("funneltfm.")) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = funneltfm.no_such_name
