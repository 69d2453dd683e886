"""The architecture, read from the sources: imports run downhill, heavy ones are late, all is documented."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lever_lm

ROOT = Path(lever_lm.__file__).parent
# Imports run one way: a package imports from those left of it and from itself.
PACKAGES = ["utils", "config", "data", "tasks", "selectors", "lvlm", "training", "evaluation", "cli"]
LEVEL = {name: level for level, name in enumerate(PACKAGES)}
# Public import paths: a face re-exports what SPEC and the Python page promise there; the package imports from none.
FACES = ["errors", "policy", "losses", "rewards", "rollouts", "metrics", "checkpoint"]
FACES += ["settings", "console", "pipeline", "evaluating"]
# What pure modules may use of the standard library and beyond: no files, no processes, no clocks.
PURE = ["tasks.vqa_metrics", "tasks.answer_stems", "tasks.cider"]
PURE += [
    "selectors.pointer.variants",
    "selectors.pointer.encoder",
    "selectors.pointer.decoding",
    "selectors.pointer.model",
    "training.losses",
    "training.rewards",
    "evaluation.statistics",
]
PURE_IMPORTS = {"numpy", "torch", "lever_lm"}
PURE_IMPORTS |= {"collections", "copy", "dataclasses", "difflib", "functools", "math", "re"}
LATE = {
    "transformers",
    "datasets",
    "qwen_vl_utils",
    "jinja2",
    "torchvision",
    "tokenizers",
    "huggingface_hub",
    "PIL",
    "httpx2",
    "tenacity",
    "matplotlib",
    "tensorboard",
}


def module_name(path: Path) -> str:
    """`checkpoint`, `data`, `data.okvqa`; the package itself is the empty name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in sorted(ROOT.rglob("*.py"))
    if "assets" not in path.parts
}


def imported(node, module: str) -> list[str]:
    """Full names that one import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
    names = []
    for alias in node.names:
        inner = f"{node.module}.{alias.name}".removeprefix("lever_lm.")
        names.append(f"lever_lm.{inner}" if node.module.startswith("lever_lm") and inner in TREES else node.module)
    return names


def imports(module: str, late: bool = True):
    """(line, full name) of every import of a module, those inside functions included unless `late` is False."""
    stack = [TREES[module]]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, name) for name in imported(node, module))
        if late or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))


def own(module: str):
    """(line, module of ours) that it imports, without itself."""
    for line, name in imports(module):
        if name.split(".")[0] == "lever_lm":
            yield line, name.removeprefix("lever_lm").lstrip(".")


def package(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_one_of_the_nine_packages():
    unknown = {package(module) for module in TREES} - {*PACKAGES, "", "__main__", *FACES}
    assert not unknown, f"move {sorted(unknown)} into one of {', '.join(PACKAGES)}"
    assert len(TREES) > 25


@pytest.mark.parametrize("module", sorted(module for module in TREES if package(module) in LEVEL))
def test_imports_run_downhill(module):
    wrong = [
        f"lever_lm.{module}, line {line}, imports lever_lm.{name}"
        for line, name in own(module)
        if name and (package(name) not in LEVEL or LEVEL[package(name)] > LEVEL[package(module)])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("face", FACES)
def test_a_public_path_is_a_thin_face(face):
    source = (ROOT / f"{face}.py").read_text(encoding="utf-8")
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in TREES[face].body)
    assert len(source.splitlines()) <= 8
    names = importlib.import_module(f"lever_lm.{face}").__all__
    assert names
    assert all(hasattr(importlib.import_module(f"lever_lm.{face}"), name) for name in names)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {name for _, name in own(module)} - {module} for module in TREES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' → '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("module", [module for module in PURE if module in TREES])
def test_the_maths_knows_neither_configs_nor_files(module):
    wrong = [
        f"lever_lm.{module}, line {line}, imports {name}"
        for line, name in imports(module)
        if name.split(".")[0] not in PURE_IMPORTS
        or (name.startswith("lever_lm") and name.removeprefix("lever_lm.") not in PURE)
    ]
    assert not wrong, "\n".join(wrong)
    opened = [
        f"lever_lm.{module}, line {node.lineno}, calls {node.func.id}"
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input")
    ]
    assert not opened, "\n".join(opened)


@pytest.mark.parametrize("module", TREES)
def test_heavy_packages_are_imported_inside_functions(module):
    wrong = [
        f"lever_lm.{module}, line {line}, imports {name} at its top: `lever --help` would wait for it"
        for line, name in imports(module, late=False)
        if name.split(".")[0] in LATE
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "cli.commands",
        "cli.run_config",
        "cli.options",
        "cli.entrypoint",
        "__main__",
        "utils.errors",
        "config.load",
        "",
    ],
)
def test_what_help_needs_imports_no_torch(module):
    reached, queue = {}, [(module, module)]
    while queue:
        name, path = queue.pop()
        for line, imported_name in imports(name, late=False):
            assert imported_name.split(".")[0] not in {"torch", "numpy", *LATE}, f"{path}, line {line}: {imported_name}"
            inner = imported_name.removeprefix("lever_lm").lstrip(".")
            if imported_name.startswith("lever_lm") and inner not in reached:
                reached[inner] = path
                queue.append((inner, f"{path} → {inner}"))


@pytest.mark.parametrize("module", TREES)
def test_modules_and_what_they_offer_are_documented(module):
    tree = TREES[module]
    public = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [
        f"lever_lm.{module}.{node.name}, line {node.lineno}"
        for node in tree.body
        if isinstance(node, public) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    if module != "__main__" and not ast.get_docstring(tree):
        bare.append(f"lever_lm.{module} itself")
    assert not bare, f"without docstring: {', '.join(bare)}"
