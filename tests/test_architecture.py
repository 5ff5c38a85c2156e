"""The rules that keep the code readable, checked on the code itself."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "model", "parallel", "data", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODEL_SOURCES = [path for path in SOURCES if path.is_relative_to(ROOT / "model")]

MAX_FILE_LINES = 300
MAX_KERNEL_LINES = 400  # a kernel stands beside the backward pass that belongs to it
MAX_FUNCTION_LINES = 100
P90_FUNCTION_LINES = 50
PARALLEL_WORDS = {"mesh", "group", "rank", "world_size", "DTensor", "ep", "cp", "pp", "tp"}
TORCH_FREE = (
    "model.activations",
    "model.config",
    "model.cost",
    "data.config",
    "parallel.config",
    "parallel.cluster",
    "parallel.layout",
    "parallel.pipeline.rules",
    "parallel.placement",
    "parallel.checks",
    "parallel.cost",
    "parallel.traffic",
    "parallel.search",
    "train.config",
    "train.schedule",
    "train.validate",
    "train.stages",
    "launch.plan.command",
)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_holds_one_idea(path):
    limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FILE_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_functions_are_short():
    lengths = sorted((length(f), f"{name_of(path)}:{f.name}") for path in SOURCES for f in functions(path))
    assert lengths[-1][0] <= MAX_FUNCTION_LINES, lengths[-1]
    assert lengths[int(0.9 * len(lengths))][0] <= P90_FUNCTION_LINES


def test_the_training_loop_fits_one_screen():
    (fit,) = [f for f in functions(ROOT / "train" / "trainer.py") if f.name == "fit"]
    assert length(fit) <= 25


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_is_annotated(path):
    missing = []
    for function in functions(path):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        unannotated = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if unannotated or function.returns is None:
            missing.append(f"{function.name}: {unannotated or 'return'}")
    assert missing == []


@pytest.mark.parametrize("path", MODEL_SOURCES, ids=name_of)
def test_the_model_is_one_device_maths(path):
    """No mesh, process group or rank in model/: whatever is parallel enters through its four seams."""
    found = set()
    for node in ast.walk(tree(path)):
        names = {
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.arg: lambda n: [n.arg],
            ast.FunctionDef: lambda n: [n.name],
            ast.ClassDef: lambda n: [n.name],
            ast.keyword: lambda n: [n.arg],
            ast.ImportFrom: lambda n: [n.module or "", *(alias.name for alias in n.names)],
        }.get(type(node), lambda n: [])(node)
        found |= PARALLEL_WORDS & set(names)
        found |= {name for name in names if name and name.startswith("torch.distributed")}
    assert found == set()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_packages_are_never_bound_as_modules(path):
    """`import model` would collide with the commonest variable name; `from model.moe import MoE` cannot."""
    imported = {
        alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not imported & set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_configurations_are_never_changed(path):
    stores = [
        ast.unparse(target)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and _root_is_config(target.value)
    ]
    assert stores == []


def _root_is_config(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute) and node.attr.endswith("config"):
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id.endswith("config")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_package_files_only_introduce_themselves(path):
    if path.name == "__init__.py":
        body = tree(path).body
        assert len(body) == 1
        assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_hydra_stays_at_the_door(path):
    allowed = {"train/config_store.py", "train/stored_config.py"}
    if path.name == "__main__.py" or name_of(path) in allowed:
        return
    modules = {node.module or "" for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)}
    modules |= {a.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for a in node.names}
    assert not {module for module in modules if module.split(".")[0] in ("hydra", "omegaconf")}


def test_no_drawer_for_everything():
    assert not [name_of(p) for p in SOURCES if p.stem in ("utils", "common", "helpers", "misc")]


def test_every_kernel_has_a_plain_reference():
    reference = {f.name for f in functions(ROOT / "model" / "kernels" / "reference.py")}
    without = {"reference", "allocator", "blocks", "__init__"}  # none of these is a kernel
    kernels = [path for path in (ROOT / "model" / "kernels").glob("*.py") if path.stem not in without]
    assert kernels
    for path in kernels:
        public = {
            node.name for node in tree(path).body if isinstance(node, ast.FunctionDef) if node.name[0] != "_"
        }
        assert public & reference, f"{name_of(path)}: none of {sorted(public)} stands in reference.py"


def test_plans_need_no_torch():
    """Configuration, cost and schedules answer on a login node without torch."""
    code = f"import sys\nfor m in {TORCH_FREE!r}: __import__(m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("package", [*PACKAGES, "configs"])
def test_generic_names_are_ours(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)
