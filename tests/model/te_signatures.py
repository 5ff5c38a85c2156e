"""The interface of Transformer Engine that the adapter uses, read from its sources without importing them.

    python -m tests.model.te_signatures transformer_engine-2.20.2-py3-none-any.whl

writes tests/model/te_signatures.json from a wheel (`pip download --no-deps transformer-engine==2.20.2`): the
parameters of what is called, the fields of recipes with their defaults, how FusedAdam calls its kernel, and
whether the attributes are there that the adapter relies on beside the documented interface.
"""

import ast
import json
import sys
import zipfile
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

STORED = Path(__file__).with_suffix(".json")
CALLS = {
    "Linear": ("transformer_engine/pytorch/module/linear.py", "Linear", "__init__"),
    "Linear.forward": ("transformer_engine/pytorch/module/linear.py", "Linear", "forward"),
    "GroupedLinear": ("transformer_engine/pytorch/module/grouped_linear.py", "GroupedLinear", "__init__"),
    "GroupedLinear.forward": (
        "transformer_engine/pytorch/module/grouped_linear.py",
        "GroupedLinear",
        "forward",
    ),
    "Linear.backward_dw": (
        "transformer_engine/pytorch/module/base.py",
        "TransformerEngineBaseModule",
        "backward_dw",
    ),
    "GroupedLinear.backward_dw": (
        "transformer_engine/pytorch/module/grouped_linear.py",
        "GroupedLinear",
        "backward_dw",
    ),
    "autocast": ("transformer_engine/pytorch/quantization.py", "autocast", "__init__"),
}
FIELDS = {
    name: ("transformer_engine/common/recipe/__init__.py", name)
    for name in ("QParams", "Float8BlockScaling", "MXFP8BlockScaling")
}
FUSED_ADAM = ("transformer_engine/pytorch/optimizers/fused_adam.py", "FusedAdam")
ATTRIBUTES = {"_fp8_workspaces": ("transformer_engine/pytorch/module/base.py", "TransformerEngineBaseModule")}


def read(wheel: Path) -> dict[str, Any]:
    """Return what is stored, from a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        classes = {place[:2]: _class(archive, *place[:2]) for place in (*CALLS.values(), *FIELDS.values())}
        owners = {name: _class(archive, *place) for name, place in ATTRIBUTES.items()}
        fused_adam = _kernel_calls(_class(archive, *FUSED_ADAM))
    return {
        "wheel": wheel.name,
        "calls": {
            name: _parameters(_method(classes[path, kind], method))
            for name, (path, kind, method) in CALLS.items()
        },
        "fields": {name: _fields(classes[place]) for name, place in FIELDS.items()},
        "fused_adam": fused_adam,
        "attributes": {
            name: any(_assigns(node, name) for node in ast.walk(owner)) for name, owner in owners.items()
        },
    }


def stored() -> dict[str, Any]:
    """Return what was read when it was stored."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def signature(name: str) -> Signature:
    """Return the stored signature of a call, without self."""
    parameters = [
        Parameter(
            each,
            Parameter.KEYWORD_ONLY if "keyword" in how else Parameter.POSITIONAL_OR_KEYWORD,
            default=... if "optional" in how else Parameter.empty,
        )
        for each, how in stored()["calls"][name].items()
    ]
    return Signature(parameters)


def _class(archive: zipfile.ZipFile, path: str, name: str) -> ast.ClassDef:
    body = ast.parse(archive.read(path)).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def _method(owner: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == name)


def _parameters(function: ast.FunctionDef) -> dict[str, str]:
    """Return of each parameter but self whether it may be left out, and whether only its name can give it."""
    given = function.args
    assert given.posonlyargs == []
    assert given.vararg is given.kwarg is None
    required = len(given.args) - len(given.defaults)
    found = {
        each.arg: "optional" if place >= required else "required" for place, each in enumerate(given.args)
    }
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found[each.arg] = f"keyword, {'required' if default is None else 'optional'}"
    del found["self"]
    return found


def _fields(owner: ast.ClassDef) -> dict[str, str]:
    """Return names and defaults of what a class's body assigns."""
    found: dict[str, str] = {}
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = ast.unparse(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.unparse(node.value)
    return found


def _kernel_calls(owner: ast.ClassDef) -> list[str]:
    """Return with what FusedAdam calls the kernel that it has chosen, and in which order it lists tensors."""
    calls = [
        [ast.unparse(argument) for argument in node.args]
        for node in ast.walk(owner)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "multi_tensor_applier"
    ]
    lists = {
        ast.unparse(node.value)
        for node in ast.walk(owner)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "tensor_lists"
    }
    (arguments,) = calls
    (plain,) = [each for each in lists if each.startswith("[g_of_f32_model,")]
    return [*arguments, plain]


def _assigns(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == f"self.{name}"


if __name__ == "__main__":
    STORED.write_text(json.dumps(read(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
