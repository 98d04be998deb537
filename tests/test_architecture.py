"""The house rules that a machine can hold: sizes, who imports whom, what is exported, what is never done.

An exception to a budget is a comment `# budget: <reason>`: for a function on its `def`, for a module on its own line.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "holdfast"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module imports from its own layer and from those before it, never from a later one.
LAYERS = (
    {"internals"},
    {"agreement", "batch", "interruption", "own_error", "peers", "progress", "secrets", "visible"},
    {"scoring", "losses", "pages", "store"},
    {"data"},
    {"policy"},
    {"reference"},
    {"options"},
    {"config", "passed_through", "testing", "training_arguments"},
    {"arguments", "callbacks", "card", "checkpoint", "metrics", "record", "samples"},
    {"training"},
    {"trainer"},
    {"demo", "inspect", "quickstart", "report"},
    {"cli"},
)
EXPORTED = {
    "AdapterReference",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
    "ModelReference",
    "PrecomputedReference",
    "Reference",
    "WinRateCallback",
    "__version__",
}
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
BUDGET = re.compile(r"# budget: \w+")

module = pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])


def part_of(path: Path) -> str:
    """The top-level part of the package that a module belongs to: `losses`, `reference`, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(part: str) -> int:
    """The number of the layer a part is in."""
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert found, f"`{part}` is in no layer: say in tests/test_architecture.py who may import it"
    return found[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, from `holdfast`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@module
def test_module_budget(path):
    text = path.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    is_excused = any(BUDGET.match(line) for line in text.splitlines())
    assert num_lines <= MAX_MODULE_LINES or is_excused, f"{num_lines} lines"


@module
def test_function_budget(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    too_long = {
        node.name: num_lines
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (num_lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
        and not BUDGET.search(lines[node.lineno - 1])
    }
    assert not too_long


@module
def test_imports_go_one_way(path):
    part = part_of(path)
    if part == "__init__":  # only names, resolved when they are asked for; see test_import_is_light
        return
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if name.startswith("holdfast."):
            other = name.split(".")[1]
            is_root = not (PACKAGE / other).exists() and not (PACKAGE / f"{other}.py").exists()
            if is_root:  # `from holdfast import DPOTrainer`: where the whole package is used as a user would
                assert layer(part) >= layer("demo"), f"{part} imports {name} from the package's root"
            else:
                assert layer(other) <= layer(part), f"{part} imports {name}, which is above it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "losses").glob("*.py")), ids=lambda path: path.stem)
def test_losses_stand_on_torch_and_batch_alone(path):
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in outside if name.split(".")[0] not in ("torch", "jaxtyping", "holdfast")} == set()
    of_the_package = {".".join(name.split(".")[:2]) for name in outside if name.startswith("holdfast")}
    assert of_the_package <= {"holdfast.batch", "holdfast.losses"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "store").glob("*.py")), ids=lambda path: path.stem)
def test_the_store_knows_no_model(path):
    """Of the package it imports itself and the batch's records, and of libraries none that has models."""
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    own = {name for name in names if name.startswith("holdfast.")}
    assert {name for name in own if name.split(".")[1] not in ("batch", "store")} == set()
    assert {name for name in names if name.split(".")[0] in ("accelerate", "peft", "transformers")} == set()
    assert {name for name in names if name.startswith("torch.nn")} == set()


def private_names_of_others(source: str, own: set[str]) -> list[str]:
    """The private names (`_x`) in `source` that are none of the package's own: attributes, options of calls, texts that
    name one (in `getattr` and its like, as a key, in `... in vars(x)`), and imports."""
    tree = ast.parse(source)
    found = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATTRIBUTE_FUNCTIONS:
            found += [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        match node:
            case ast.keyword(arg=str(name)):
                found.append(name)
            case ast.Call(func=ast.Attribute(attr="get" | "pop" | "setdefault"), args=[ast.Constant(value=name), *_]):
                found.append(name)
            case ast.Call(func=ast.Name(id="attrgetter" | "methodcaller"), args=[ast.Constant(value=name), *_]):
                found += str(name).split(".")
            case ast.Subscript(slice=ast.Constant(value=name)) | ast.Compare(left=ast.Constant(value=name)):
                found.append(name)
    for name in imported(tree):
        if name.split(".")[0] in LIBRARIES:
            found += name.split(".")
    is_private = re.compile(r"_(?!_)\w+")
    return sorted({name for name in found if is_private.fullmatch(str(name)) and name not in own | OF_PYTHON})


@functools.cache
def own_private_names() -> set[str]:
    """Every private name that the package itself defines, but for those that `Trainer` knows too."""
    names: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    names.add(name)
                case (
                    ast.Name(id=name, ctx=ast.Store())
                    | ast.Attribute(value=ast.Name(id="self" | "cls" | "store"), attr=name, ctx=ast.Store())
                ):
                    names.add(name)
                case ast.alias(name=name):
                    names.add(name)
    return names


LIBRARIES = ("torch", "transformers", "peft", "accelerate")
ATTRIBUTE_FUNCTIONS = {"getattr", "setattr", "hasattr", "delattr"}
OF_PYTHON = {"_replace", "_asdict", "_fields", "_exit", "_current_frames"}
"""Public names of the standard library that look private."""


@module
def test_private_names_of_libraries_stand_in_internals(path):
    """Behind probes (see `holdfast.internals`); in `trainer.py` those of `Trainer` that the table there lists."""
    from holdfast.internals.transformers import CALLED, OVERRIDDEN

    if part_of(path) == "internals":
        return
    allowed = own_private_names() | set(OVERRIDDEN) | set(CALLED) | {"_signature_columns"}
    assert private_names_of_others(path.read_text(encoding="utf-8"), allowed) == []


@pytest.mark.parametrize(
    "planted",
    [
        "model._forward_hooks", "layer._disable_adapters = True", "getattr(config, '_attn_implementation', None)",
        "from torch._dynamo import OptimizedModule", "import torch._dynamo", "from peft.utils import _get_submodules",
        "hasattr(model, '_orig_mod')", "self.accelerator._models", "setattr(layer, '_active_adapter', [])",
        "create_block_mask(sees, _compile=True)", "vars(model).get('_orig_mod')", "vars(model)['_forward_hooks']",
        "'_hf_hook' in vars(model)", "attrgetter('base_model._cast_input')", "model.__dict__.pop('_hf_hook', None)",
    ],
)  # fmt: skip
def test_a_planted_private_name_is_found(planted):
    assert private_names_of_others(planted, own_private_names())


@module
def test_names_say_what_a_module_is_about(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc", "tools"}


@module
def test_nothing_is_unpickled(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name for name in imported(tree) if name.split(".")[0] in unsafe or name == "torch.load"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "load"]
    assert not [node.lineno for node in calls if isinstance(node.value, ast.Name) and node.value.id == "torch"]


@module
def test_public_things_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    bare = [node.name for node in definitions if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare
    assert ast.get_docstring(tree) or not tree.body, "a module says what it is for"


def test_import_is_light():
    code = (
        "import sys, holdfast; names = ['torch', 'transformers', 'datasets', 'peft', 'numpy', 'matplotlib']; "
        "print([name for name in names if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_exported_names():
    assert set(holdfast.__all__) == EXPORTED
    assert EXPORTED - set(dir(holdfast)) == set()
    for name in EXPORTED:
        assert getattr(holdfast, name) is not None


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="has no attribute 'DPOTrainr'"):
        _ = holdfast.DPOTrainr


def test_version_is_the_one_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert holdfast.__version__ == project["version"]


def test_tested_versions_satisfy_nothing_twice():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)] == []
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {re.split(r"[<>=]", name)[0].replace("_", "-") for name in required} - set(names) == set()


def project_files() -> list[Path]:
    """The text files of the repository: what git tracks or would, or every file where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not {".git", ".venv", ".venv-oldest", "site"} & set(path.parts)]
    texts = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".cfg", ".html", ""}
    return [path for path in paths if path.suffix in texts and path.is_file()]


def test_no_path_of_somebody_s_machine():
    pattern = re.compile(r"(?<![\w.~/])/(?:home|root|Users|work|opt|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
