# SPDX-License-Identifier: Apache-2.0
"""The structure of the project, enforced: who imports whom, what every operator has, sizes, and what an import costs."""

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmkernels
from vlmkernels.bench import plots, results

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlmkernels"
PYTHON = sorted(p for folder in ("vlmkernels", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
CUDA = sorted(p for pattern in ("*.cu", "*.cuh", "*.h", "*.cpp") for p in (ROOT / "csrc").rglob(pattern))
BACKENDS = sorted(p.name for p in (PACKAGE / "backends").iterdir() if (p / "__init__.py").exists())
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))

MAX_FILE, MAX_FUNCTION = 600, 80

#: What a layer may import of the package, by the prefix of the importing module; the first that fits holds. Each backend sees
#: only itself, and nothing sees what is above it.
MAY_IMPORT = [
    *((f"vlmkernels.backends.{name}", [f"vlmkernels.backends.{name}"]) for name in BACKENDS),
    ("vlmkernels.backends", []),
    ("vlmkernels.masks", ["vlmkernels.masks", "vlmkernels.ops._op"]),  # _op, which holds bad_argument, imports nothing of ours
    ("vlmkernels.rope_tables", ["vlmkernels.ops._op"]),
    ("vlmkernels.ops._op", []),
    ("vlmkernels.ops", ["vlmkernels.masks", "vlmkernels.ops"]),
    ("vlmkernels.nn", [f"vlmkernels.{layer}" for layer in ("masks", "rope_tables", "ops", "nn")]),
    ("vlmkernels.integrations", [f"vlmkernels.{layer}" for layer in ("masks", "ops", "nn", "integrations")]),
    ("vlmkernels.testing", ["vlmkernels.testing"]),
]
#: What the product may import from outside besides the standard library, at the top of a module.
OUTSIDE = {
    "vlmkernels.backends.triton": {"torch", "triton"},
    "vlmkernels.backends": {"torch"},
    "vlmkernels.masks": {"torch"},
    "vlmkernels.ops": {"torch"},
    "vlmkernels.nn": {"torch"},
    "vlmkernels.integrations.transformers_attention": {"torch", "transformers"},
    "vlmkernels.integrations": {"torch"},
    "vlmkernels.testing": {"torch", "numpy"},
    "vlmkernels.__init__": {"torch"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(tree: ast.AST, name: str) -> Iterator[str]:
    """Every module that ``tree`` imports, in functions too; a name imported from a package counts as its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) + "." if node.level else ""
            yield from (f"{base}{node.module or ''}.{alias.name}" for alias in node.names)


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


@pytest.mark.parametrize("path", [p for p in PYTHON if PACKAGE in p.parents], ids=relative)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    allowed = next((allowed for prefix, allowed in MAY_IMPORT if below(name, prefix)), None)
    if allowed is None:  # the command line and the benchmark stand on top
        return
    inside = [m for m in imports(ast.parse(path.read_text()), name) if below(m, "vlmkernels")]
    assert not [m for m in inside if not any(below(m, prefix) for prefix in allowed)]


@pytest.mark.parametrize("path", [p for p in PYTHON if PACKAGE in p.parents], ids=relative)
def test_modules_need_little_from_outside(path: Path) -> None:
    name = module_name(path)
    allowed = next((allowed for prefix, allowed in OUTSIDE.items() if below(name, prefix)), None)
    if allowed is None:
        return
    body = ast.parse(path.read_text()).body
    top = {m.split(".")[0] for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) for m in imports(node, name)}
    assert not top - allowed - set(sys.stdlib_module_names) - {"vlmkernels", "__future__"}


def test_the_rules_catch_what_they_are_for() -> None:
    tree = ast.parse("def f():\n    from vlmkernels.backends.torch import attention\n    import vlmkernels.nn as nn")
    assert list(imports(tree, "vlmkernels.ops.rope")) == ["vlmkernels.backends.torch.attention", "vlmkernels.nn"]
    assert list(imports(ast.parse("from ..ops import _op"), "vlmkernels.nn.layer")) == ["vlmkernels.ops._op"]
    assert below("vlmkernels.ops._op", "vlmkernels.ops") and not below("vlmkernels.ops2", "vlmkernels.ops")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_parts(op: str) -> None:
    """The same stem in every tree. What is composed of other operators has no backends; what isn't exported needs no page."""
    exported = f"vlmkernels.ops.{op} import" in (PACKAGE / "__init__.py").read_text()
    parts = [ROOT / "tests" / f"test_{op}.py"]
    if re.search(r"^(\w+ = )?Op\(", (PACKAGE / "ops" / f"{op}.py").read_text(), re.MULTILINE):
        parts.append(PACKAGE / "backends" / "reference" / f"{op}.py")
    if exported:
        parts.append(ROOT / "docs" / f"{op}.md")
    assert not [relative(part) for part in parts if not part.exists()]


def test_every_backend_module_belongs_to_an_op() -> None:
    modules = {p.stem for name in BACKENDS for p in (PACKAGE / "backends" / name).glob("*.py") if not p.stem.startswith("_")}
    assert not modules - set(OPS)


@pytest.mark.parametrize("path", [*PYTHON, *CUDA], ids=relative)
def test_files_are_short_and_licensed(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE
    assert lines and re.fullmatch(r"(# |// |/\* )SPDX-License-Identifier: Apache-2.0( \*/)?", lines[0])


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, less the docstring, which for a public function holds its documentation."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", [p for p in PYTHON if PACKAGE in p.parents], ids=relative)
def test_functions_are_short(path: Path) -> None:
    """Kernels are exempt: what one program does is told in one place."""
    found = [f for f in functions(ast.parse(path.read_text())) if not any("jit" in ast.unparse(d) for d in f.decorator_list)]
    assert not [f"{f.name}: {length(f)} lines" for f in found if length(f) > MAX_FUNCTION]


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_no_decorator_is_commented_out(path: Path) -> None:
    assert not re.findall(r"^\s*#\s*@\w+.*", path.read_text(), re.MULTILINE)


IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import vlmkernels
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def run_python(script: str, given: str = "", **variables: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    """What ``import vlmkernels`` adds to ``import torch``, in CPU time; the fastest of several, as a busy machine only adds."""
    seconds = []
    for _ in range(5):
        elapsed, added = run_python(IMPORT).splitlines()
        seconds.append(float(elapsed))
        if min(seconds) < 0.15:
            break
    assert not {"triton", "transformers", "timm", "open_clip", "matplotlib", "rich", "skimage", "scipy"} & set(added.split())
    assert min(seconds) < 0.15


#: The pages with an example, and what must hold after it.
EXAMPLES = {
    "README.md": "assert out.shape == exact.shape and tokens.shape == (2, 196, 768)",
    **{f"docs/{name}.md": "" for name in ("accelerate", "attention", "backends", "contrastive", "cross_attention", "pos_embed")},
    **{f"docs/{name}.md": "" for name in ("rope", "transformers")},
}
EXAMPLE = """
import json, sys, traceback
errors = {}
for page, text in json.load(sys.stdin).items():
    try:
        exec(compile(text, page, "exec"), {})
    except Exception:
        errors[page] = traceback.format_exc()
print(json.dumps(errors))
"""


@functools.cache
def errors_of_examples() -> dict[str, str]:
    """Of all pages, in one process: not this one, where without a GPU Triton's interpreter would take their tensors."""
    texts = {}
    for page, then in EXAMPLES.items():
        (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        texts[page] = f"{text}\n{then}"
    errors: dict[str, str] = json.loads(run_python(EXAMPLE, json.dumps(texts), TRITON_INTERPRET="0").splitlines()[-1])
    return errors


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_example_on_a_page_runs(page: str) -> None:
    assert page not in errors_of_examples(), errors_of_examples()[page]


def test_the_readme_shows_the_results() -> None:
    file = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", file)
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text()
    report = results.read(tables.RESULTS)
    assert readme.count("<!-- results:") >= 5 and f"]({relative(tables.PLOT)})" in readme
    assert tables.written(readme, report) == readme, f"python {relative(file)}"
    # What the plot shows stands in the file, as pixels differ between versions of matplotlib.
    shown = importlib.import_module("PIL.Image").open(tables.PLOT).text["Comment"]
    assert shown == plots.standings_data(report), f"python {relative(file)}"


@pytest.mark.parametrize(
    "page",
    [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted((ROOT / "docs").glob("*.md"))],
    ids=relative,
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_page_of_models_names_what_exists() -> None:
    named = set(re.findall(r"`(\w+)[`(.]", (ROOT / "docs" / "models.md").read_text())) - {"accelerate", "state_dict"}
    here = [vlmkernels, vlmkernels.nn, vlmkernels.KeyRanges, importlib.import_module("vlmkernels.masks")]
    assert len(named) > 20 and not [name for name in named if not any(hasattr(where, name) for where in here)]
