"""The house rules that a machine can keep: layout, import ranks, sizes, names, where gin may be imported."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gpt4moe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))

RANKS = {
    **dict.fromkeys(("config", "types", "accounting", "process", "drawing"), 0),
    **dict.fromkeys(("data", "model"), 1),
    "parallel": 2,
    "checkpoint": 3,
    **dict.fromkeys(("train", "infer"), 4),
    **dict.fromkeys(("serve", "interop", "plan", "sweep", "analysis"), 5),
    **dict.fromkeys(("configure", "flags", "flags_plan", "launch"), 6),
}
PLAN_RANKS = {
    **dict.fromkeys(("compiled", "training", "serving"), 0),
    **dict.fromkeys(("money", "article"), 1),
    "search": 2,
    "published": 3,
    "words": 4,
}
STANDARD_LIBRARY_ONLY = ("config", "accounting")
TOP_LEVEL = {
    "gpt4moe", "experiments", "gin_configs", "tests", "benchmarks", "notebooks", "docs", "setup.py", "pyproject.toml",
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci", ".git", ".gitignore",
}  # fmt: skip
SAYS_NOTHING = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LIBRARY_LINES = 400, 60, 43_900


def _folder(path: pathlib.Path) -> str:
    """`gpt4moe/model/rope.py` belongs to `model`, `gpt4moe/launch.py` to `launch`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: pathlib.Path) -> list[str]:
    """Dotted names of every module that a file imports, wherever in the file the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.stem in RANKS], ids=str)
def test_imports_only_lower_ranks_or_its_own_folder(path):
    folder = _folder(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "gpt4moe" or len(parts) < 2 or parts[1] not in RANKS:
            continue
        lower = RANKS[parts[1]] < RANKS[folder]
        counts_configs = (folder, parts[1]) in {
            ("accounting", "config"),
            ("launch", "flags"),
            ("flags", "flags_plan"),
            ("launch", "configure"),
        }  # one rank, one way
        assert lower or parts[1] == folder or counts_configs, f"{path.relative_to(ROOT)} ({folder}) imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "plan").glob("*/*.py")), ids=str)
def test_folders_of_the_planner_import_one_way(path):
    folder = path.parent.name
    for name in _imports(path):
        parts = name.split(".")
        if parts[:2] == ["gpt4moe", "plan"]:
            assert parts[2] == folder or PLAN_RANKS[parts[2]] < PLAN_RANKS[folder], f"{folder} imports {name}"


@pytest.mark.parametrize("folder", STANDARD_LIBRARY_ONLY)
def test_configuration_and_accounting_import_the_standard_library_only(folder):
    import sys

    for path in (PACKAGE / folder).rglob("*.py"):
        for name in _imports(path):
            root = name.split(".")[0]
            assert root in sys.stdlib_module_names or root == "gpt4moe", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=str)
def test_one_file_imports_gin(path):
    importers = [name for name in _imports(path) if name.split(".")[0] == "gin"]
    assert not importers or path == PACKAGE / "configure.py"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=str)
def test_files_and_functions_stay_small_and_well_named(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    assert path.stem not in SAYS_NOTHING
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_file_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "no module docstring"


def test_the_library_stays_readable_in_an_afternoon():
    assert sum(path.read_text().count("\n") for path in SOURCES) <= MAX_LIBRARY_LINES


def test_top_level_holds_what_the_design_names():
    listed = {path.name for path in ROOT.iterdir()}
    generated = {
        name for name in listed if name.endswith((".egg-info", "_cache")) or name in {"__pycache__", ".venv", "runs"}
    }
    assert listed - generated <= TOP_LEVEL


def test_every_gin_folder_is_a_package():
    folders = {path.parent for path in (ROOT / "gin_configs").rglob("*.gin")} | {ROOT / "gin_configs"}
    assert all((folder / "__init__.py").exists() for folder in folders)
