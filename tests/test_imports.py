"""Which module may import which, read from the sources: the rules of the design, held."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("planner", "simulate", "dispatch", "reports")
# Modules of the planner, each line importing only from lines above it or from its own.
ORDER = (
    ("errors",),
    ("units", "serial"),
    ("hardware", "soundness", "products", "gpus", "hosts", "machines", "machine_file", "local"),
    ("holdings",),
    ("workload", "graph", "rules", "popularity"),
    ("chunks", "host_cache"),
    ("plan", "changes", "measurement", "check"),
    ("device_map",),
    ("map_fill", "module_sizes"),
    ("precision",),
    ("lifetimes", "interpolation"),
    ("memory", "cuda_allocator", "cache", "models"),
    ("phrases", "coarse_map"),
    ("headers",),
    ("rates",),
    ("steps", "cost", "loading", "growth"),
    ("execution", "kernels"),
    ("conversions", "stored", "journal", "storages", "template", "layers", "recorder", "inputs", "empty_init"),
    ("module_units",),
    ("memory_caps",),
    ("auto_map",),
    ("trace", "placement", "verify", "correction"),
    ("footprint",),
    ("given", "tracer"),
    ("accelerate_map",),
    ("question",),
    ("search", "explanation", "fixes"),
    ("api",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
VALUES = {"errors", "units", "serial", "hardware", "workload", "graph", "rules", "plan", "measurement"}
NUMPY = ("planner.placement.tables", "planner.placement.rent", "planner.placement.ways")
TORCH = {
    "planner.execution", "planner.conversions", "planner.storages", "planner.layers", "planner.recorder",
    "planner.template", "planner.inputs", "planner.trace", "planner.empty_init", "planner.module_units",
    "planner.kernels.cpu", "planner.kernels.cpu_products",
    "planner.kernels.cpu_rules", "planner.kernels.cuda", "planner.kernels.cuda_attention",
    "planner.kernels.cuda_reductions", "planner.kernels.onednn", "planner.kernels.programs",
}  # fmt: skip
HEAVY = {"torch", "transformers", "ortools", "pandas", "plotly", "numpy", "networkx", "safetensors", "huggingface_hub"}
# Devices to run real code on: they measure.
VIRTUAL = ("simulate.virtual_clock", "simulate.virtual_device", "simulate.virtual_machine")
CALIBRATION = tuple(
    f"simulate.calibration{name}"
    for name in ("", ".decoder", ".disk", ".figures", ".gpu", ".machine", ".processor", ".together")
)
MEASURES = (*VIRTUAL, *CALIBRATION)


@dataclass(frozen=True)
class Import:
    """One import. lazy: inside a function, or for type checkers alone."""

    target: str
    lazy: bool
    typing_only: bool


@cache
def modules() -> dict[str, tuple[Import, ...]]:
    """Return {module: its imports}, `import_module("...")` with a literal included."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = tuple(imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports_of(node: ast.AST, *, lazy: bool = False, typing_only: bool = False) -> list[Import]:
    found: list[Import] = []
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        only = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        if isinstance(child, ast.Import):
            found += [Import(alias.name, inside, only) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            found += [Import(f"{child.module}.{alias.name}", inside, only) for alias in child.names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            found += [Import(a.value, inside, only) for a in child.args if isinstance(a, ast.Constant)]
        found += imports_of(child, lazy=inside, typing_only=only)
    return found


def module_in(target: str) -> str:
    """Return the module of ours that an import names: `planner.plan.Plan` is `planner.plan`."""
    known = modules()
    while target not in known and "." in target:
        target = target.rpartition(".")[0]
    return target


def top(target: str) -> str:
    return target.partition(".")[0]


def room(module: str) -> str:
    """Return a planner module's place in ORDER: `planner.placement.counts` is `placement`."""
    return module.split(".")[1]


def planner_modules() -> list[str]:
    skipped = ("planner", "planner.commands", "planner.catalogue")
    return [name for name in modules() if top(name) == "planner" and ".".join(name.split(".")[:2]) not in skipped]


@pytest.mark.parametrize("name", planner_modules())
def test_planner_imports_run_one_way(name: str) -> None:
    assert room(name) in RANK, f"give {name} its place in ORDER, and in DESIGN.md"
    for entry in modules()[name]:
        target = module_in(entry.target)
        if top(target) not in PACKAGES or entry.typing_only or target == "planner":
            continue
        if entry.lazy and (name, top(target)) == ("planner.api", "simulate"):
            continue
        if entry.lazy and (name, target) == ("planner.plan", "planner.coarse_map"):
            continue
        assert top(target) == "planner", f"{name} reaches up to {target}"
        assert room(target) in RANK, f"{name} imports {target}"
        assert RANK[room(target)] <= RANK[room(name)], f"{name} imports {target}, which stands above it"


def test_no_two_modules_import_each_other() -> None:
    edges = {
        name: {module_in(e.target) for e in imports if not e.lazy and not e.typing_only} & set(modules()) - {name}
        for name, imports in modules().items()
    }
    done: set[str] = set()
    while True:
        free = {name for name, needs in edges.items() if name not in done and needs <= done}
        if not free:
            break
        done |= free
    assert set(edges) - done == set()


def test_ortools_is_known_in_placement_only() -> None:
    users = {name for name, imports in modules().items() if any(top(e.target) == "ortools" for e in imports)}
    assert users
    assert all(name.startswith("planner.placement.") for name in users)


def test_accelerate_is_asked_for_its_map_alone_and_late() -> None:
    found = [(name, e.lazy) for name, imports in modules().items() for e in imports if top(e.target) == "accelerate"]
    assert found == [("planner.accelerate_map", True)]


def test_pandas_and_plotly_are_known_where_tables_and_figures_are_made() -> None:
    for name, imports in modules().items():
        for entry in imports:
            if top(entry.target) == "plotly":
                assert top(name) == "reports", name
            if top(entry.target) == "pandas":
                assert top(name) in ("reports", "simulate"), name
                assert entry.lazy or entry.typing_only or top(name) == "reports", name


@pytest.mark.parametrize("name", [name for name in modules() if top(name) in ("planner", "simulate", "reports")])
def test_heavy_packages_load_late(name: str) -> None:
    for entry in modules()[name]:
        if entry.lazy or entry.typing_only or top(entry.target) not in HEAVY:
            continue
        package = top(entry.target)
        allowed = (
            (package == "torch" and (name in TORCH or name in MEASURES))
            or (package == "ortools" and name.startswith("planner.placement."))
            or (package == "numpy" and name in NUMPY)
            or (package in ("plotly", "pandas") and top(name) == "reports")
        )
        assert allowed, f"{name} loads {package} when it is imported"


def test_every_package_is_installed_with_all_of_its_files() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    made = [path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    assert sorted(told["packages"]) == sorted(".".join(path.relative_to(ROOT).parts) for path in made)
    for path in made:
        others = [each for each in path.iterdir() if each.is_file() and each.suffix not in (".py", ".pyc")]
        patterns = told["package-data"].get(".".join(path.relative_to(ROOT).parts), [])
        assert all(any(each.match(pattern) for pattern in patterns) for each in others), path


@pytest.mark.parametrize("name", MEASURES)
def test_what_measures_knows_nothing_that_predicts(name: str) -> None:
    for entry in modules()[name]:
        target = module_in(entry.target)
        if top(target) in PACKAGES:
            assert target in {*MEASURES, "planner.errors", "planner.hardware"}, f"{name} imports {target}"
    for other, imports in modules().items():
        if other not in MEASURES:
            assert all(entry.lazy or entry.typing_only for entry in imports if module_in(entry.target) == name), other


def test_measuring_a_dispatched_model_knows_nothing_that_predicts() -> None:
    for name in ("dispatch.measure", "dispatch.calls"):
        found = {module_in(entry.target) for entry in modules()[name] if top(entry.target) in PACKAGES}
        values = {"planner.errors", "planner.execution", "planner.measurement", "planner.plan"}
        assert found <= values | {"dispatch.calls"}, name


@pytest.mark.parametrize("name", [name for name in modules() if top(name) == "simulate" and name not in MEASURES])
def test_simulate_knows_values_steps_memory_and_cost(name: str) -> None:
    for entry in modules()[name]:
        target = module_in(entry.target)
        if entry.lazy and (name, target) == ("simulate.placements", "planner.api"):
            continue
        if top(target) == "planner":
            allowed = VALUES | {"chunks", "host_cache", "device_map", "steps", "memory", "cost"}
            assert room(target) in allowed, f"{name} imports {target}"
        else:
            assert top(target) not in ("dispatch", "reports", "torch"), f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in modules() if top(name) == "dispatch"])
def test_dispatch_works_without_what_plans(name: str) -> None:
    for entry in modules()[name]:
        target = module_in(entry.target)
        assert top(target) not in ("ortools", "pandas", "plotly", "simulate", "reports"), f"{name} imports {target}"
        if top(target) == "planner":
            late = {"given", "models", "local"} if entry.lazy else set()
            if name == "dispatch.replan" and entry.lazy:
                late = {"api"}
            if (name, target) == ("dispatch.offload", "planner") and entry.lazy:
                continue  # "auto" asks whoever places
            values = VALUES | {"device_map"}
            allowed = values | {"steps", "memory", "execution", "headers", "conversions", "loading", "growth"} | late
            # Familiar functions that are the planner's own are dispatch's too.
            allowed |= {"auto_map", "empty_init", "memory_caps", "module_sizes"} if name == "dispatch" else set()
            assert room(target) in allowed, f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in modules() if top(name) == "reports"])
def test_reports_know_values_and_timelines(name: str) -> None:
    for entry in modules()[name]:
        target = module_in(entry.target)
        if top(target) == "planner":
            # `memory` tells which slices wait, `phrases` says so: arithmetic and words on values alone.
            assert room(target) in VALUES | {"memory", "phrases"}, f"{name} imports {target}"
        elif top(target) == "simulate":
            assert target in ("simulate.timeline", "simulate.energy"), f"{name} imports {target}"
        else:
            assert top(target) not in ("dispatch", "torch"), f"{name} imports {target}"


def test_nothing_imports_the_commands() -> None:
    for name, imports in modules().items():
        if not name.startswith("planner.commands"):
            assert not [e.target for e in imports if module_in(e.target).startswith("planner.commands")], name


# What importing loads


def loaded_by(script: str) -> set[str]:
    code = f"{script}\nimport sys, json; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "script",
    [
        "import planner, simulate, reports",
        "from planner import Plan, Hardware, Workload, InputError, verify_plan, plan_model",
        "import planner.commands.main",
    ],
)
def test_importing_is_light(script: str) -> None:
    assert loaded_by(script) & HEAVY == set()


def test_importing_dispatch_loads_torch_at_most() -> None:
    heavy = {"ortools", "pandas", "plotly", "transformers", "simulate", "reports"}
    assert loaded_by("import dispatch") & heavy == set()


# Public names

PUBLIC = {
    "planner": [
        "Explanation", "FrontierPoint", "Hardware", "InfeasibleError", "InputError", "LayerGraph", "MemoryPrediction",
        "NoSolutionInTimeError", "Pin", "Plan", "PlanError", "PlanFormatError", "PlanMismatchError", "Popularity",
        "Rules", "Sensitivity", "TraceError", "Violation", "Workload", "check_device_map", "compute_module_sizes",
        "corrected_hardware", "explain", "find_tied_parameters", "frontier", "get_balanced_memory", "get_max_memory",
        "infer_auto_device_map", "init_empty_weights", "init_on_device", "place", "plan_from_device_map", "plan_model",
        "predict", "predict_memory", "verify_plan",
    ],
    "simulate": [
        "Interval", "LaneUse", "MemorySample", "Timeline", "energy_joules", "run", "run_accelerate", "virtual",
    ],
    "dispatch": [
        "CacheStatistics", "Checkpoint", "Measurement", "Recording", "align_module_device", "apply", "cache_statistics",
        "check_device_map", "compute_module_sizes", "cpu_offload", "cpu_offload_with_hook", "disk_offload",
        "dispatch_model", "find_tied_parameters", "get_balanced_memory", "get_max_memory", "has_offloaded_params",
        "infer_auto_device_map", "init_empty_weights", "init_on_device", "load_checkpoint_and_dispatch",
        "load_checkpoint_in_model", "measure", "remove", "remove_hook_from_module", "remove_hook_from_submodules",
        "weights_at_home",
    ],
    "reports": ["page_html", "write_report"],
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these_and_resolve(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package]
    for name in PUBLIC[package]:
        assert getattr(module, name) is not None
        # A module called like a name that loads late would take its place; `dispatch` loads its names at once.
        assert f"{package}.{name}" not in modules() or (package, name) == ("dispatch", "measure")
    with pytest.raises(AttributeError):
        _ = module.no_such_name
