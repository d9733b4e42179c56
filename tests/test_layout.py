"""Guards of the layout: what keeps the root importable as the package, and imports going one way."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("schemas", "tokenizers", "pipeline", "jobs")
ALLOWED_FOREIGN = {"schemas": {"numpy", "pyarrow", "pydantic"}}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Level and module of every import anywhere in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found.extend((0, alias.name) for alias in node.names)
    return found


def test_only_the_root_has_an_init_file() -> None:
    found = [p.relative_to(ROOT) for p in ROOT.rglob("__init__.py") if not {".venv", "build"} & set(p.parts)]
    assert found == [Path("__init__.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    earlier = FOLDERS[: FOLDERS.index(folder)]
    for level, module in imports_of(path):
        if level == 2 and module:
            target = module.split(".")[0]
            assert target in earlier, f"{folder} imports {target}"
            if folder == "pipeline" and target == "tokenizers":
                assert module == "tokenizers.base", "pipeline takes only the protocols of tokenizers"
        assert level <= 2
        assert not (level == 0 and module.split(".")[0] == "tokenmill"), "inside the package imports are relative"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "schemas"], ids=lambda p: p.name)
def test_schemas_import_only_light_libraries(path: Path) -> None:
    foreign = {module.split(".")[0] for level, module in imports_of(path) if level == 0}
    assert foreign - set(sys.stdlib_module_names) <= ALLOWED_FOREIGN["schemas"]


def test_ray_is_imported_in_two_files_only() -> None:
    importers = [p.name for p in FILES if any(m.split(".")[0] == "ray" for level, m in imports_of(p) if level == 0)]
    assert importers == ["ray_data.py", "ray_executor.py"]


def test_every_folder_with_code_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.relative_to(ROOT).parent for path in FILES}
    assert set(packages) == {"tokenmill", *(".".join(("tokenmill", *folder.parts)) for folder in folders)}


def test_no_file_is_named_after_a_module() -> None:
    dependencies = {
        "av",
        "decord",
        "duckdb",
        "fsspec",
        "numpy",
        "pyarrow",
        "pydantic",
        "ray",
        "rich",
        "torch",
        "typer",
    }
    taken = {path.stem for path in FILES} & (set(sys.stdlib_module_names) | dependencies | {"webdataset", "yaml"})
    assert not taken


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("arguments", [["-c", "import tokenmill"], ["-m", "tokenmill.jobs.main", "run", "--help"]])
def test_importing_and_helping_load_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = "import runpy, sys, contextlib\n"
    if arguments[0] == "-c":
        code += arguments[1]
    else:
        code += f"sys.argv = ['tokenmill', *{arguments[2:]!r}]\nfrom tokenmill.jobs.main import main\n"
        code += "with contextlib.suppress(SystemExit): main()"
    code += "\nprint(sorted({'torch', 'ray', 'duckdb', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
