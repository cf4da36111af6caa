"""The arrows of the package point one way. Read off the source, so that an import within a function counts too."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import accel_tp_ddp

PACKAGE = Path(accel_tp_ddp.__file__).parent
TESTS = Path(__file__).parents[1]
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

# The wings, from the lowest: a module imports from its own wing and from those below.
WINGS = ("core", "training", "styles", "loss", "plans", "checkpoint", "model", "proof", "plugin", "tools")
ENTRANCES = {"__init__.py", "cli.py", "doctor.py", "launch.py"}

KNOW_ACCELERATE = {
    *ENTRANCES,
    *(file for file in SOURCES if file.startswith(("plugin/", "tools/"))),
    *("checkpoint/from_pretrained.py", "checkpoint/load.py", "checkpoint/merge.py", "checkpoint/places.py"),
    "checkpoint/save.py",
}
FOREIGN = {"accelerate", "transformers", "trl", "peft", "datasets"}
KNOW_PEFT = {  # for models that hold adapters already
    *("model/peft_methods.py", "plans/peft.py"),
    *(file for file in SOURCES if file.startswith("styles/peft/")),
}

# Which files may call collectives. All those of a forward or backward stand in core/collectives.py.
CALL_COLLECTIVES = {
    "core/collectives.py": "compute; set-up: the first rank's values",
    "core/control.py": "objects that ranks tell one another, between steps; the end of the script",
    "training/gradients.py": "the norm of the full gradient",
    "plugin/replica_view.py": "what a script gathers, reduces and broadcasts, over the replicas",
    "proof/compare.py": "set-up: the ranks of the proof, and what each has found",
    "tools/links.py": "doctor: whether a group works, and how fast it is",
    "tools/ranks.py": "the end of a rank of the command",
    "training/drift.py": "between steps: what is replicated stays equal",
    "training/zero1.py": "after a step, and where a full state is asked for: what each replica has",
    "tools/simulate.py": "one rank of a fake group: nothing is sent",
}
COLLECTIVES = {
    *(
        "all_gather",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather_object",
        "all_reduce",
    ),
    *("all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
    *("all_gather_tensor", "reduce_scatter_tensor_coalesced", "all_gather_tensor_autograd", "wait_tensor"),
}
METHODS = {"allgather", "allreduce", "alltoall", "alltoall_base", "reduce_scatter", "_allgather_base"}  # of a group


@cache  # each file is asked about once for every other
def imported(source: str, file: str) -> set[str]:
    """Absolute dotted names of what `file` imports when it runs; what stands under TYPE_CHECKING does not run."""
    here = ["accel_tp_ddp", *Path(file).parent.parts]
    names = set()
    for node in running(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def running(tree: ast.AST):
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        children = tree.orelse
    else:
        yield tree
        children = ast.iter_child_nodes(tree)
    for child in children:
        yield from running(child)


def called_collectives(source: str) -> set[str]:
    """Names of the torch.distributed collectives that a source calls or imports, under whatever alias."""
    tree = ast.parse(source)
    modules, functions = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names if a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            for alias in node.names:
                if node.module.startswith("torch.distributed") and alias.name in COLLECTIVES:
                    functions[alias.asname or alias.name] = alias.name
                elif alias.name in ("distributed", "_functional_collectives", "distributed_c10d"):
                    modules.add(alias.asname or alias.name)
    found = set(functions.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            if owner in modules or owner.startswith(("torch.distributed", "torch.ops")):
                found.add(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            found.add(node.attr)
    return found


def wing_of(file: str) -> str:
    return file.partition("/")[0] if "/" in file else ""


def test_the_layering_tests_read_every_wing():
    expected = {"core/collectives.py", "model/dtensor.py", "plans/plan.py", "plugin/config.py", "styles/base.py"}
    assert expected <= SOURCES.keys() and set(map(wing_of, SOURCES)) == {"", *WINGS}


def test_the_top_of_the_package_holds_the_entrances_only():
    assert {file for file in SOURCES if not wing_of(file)} == ENTRANCES


@pytest.mark.parametrize("file", sorted(set(SOURCES) - ENTRANCES))
def test_arrows_point_down(file):
    wings = {name.split(".")[1] for name in imported(SOURCES[file], file) if name.startswith("accel_tp_ddp.")}
    assert wings <= set(WINGS[: WINGS.index(wing_of(file)) + 1])


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_only_the_top_modules_know_accelerate_and_transformers(file):
    foreign = {name.partition(".")[0] for name in imported(SOURCES[file], file)} & FOREIGN
    allowed = FOREIGN if file in KNOW_ACCELERATE else {"peft"} if file in KNOW_PEFT else set()
    assert foreign <= allowed, f"{file} imports {foreign - allowed}"


def test_peft_is_never_imported_by_merely_importing_the_package():
    for file in KNOW_PEFT:
        at_the_top = [node for node in ast.parse(SOURCES[file]).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name.partition(".")[0] for node in at_the_top for name in imported(ast.unparse(node), file)}
        assert "peft" not in names, file


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_what_is_below_does_not_import_the_top_modules(file):
    top = {f"accel_tp_ddp.{name.removesuffix('.py').replace('/', '.')}" for name in KNOW_ACCELERATE - {"__init__.py"}}
    if file not in KNOW_ACCELERATE:
        assert not imported(SOURCES[file], file) & top


def test_no_module_imports_itself_in_a_circle():
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in SOURCES}
    graph = {
        module: {
            other
            for other in modules
            if other not in (module, "__init__")
            and f"accel_tp_ddp.{other}" in imported(SOURCES[name], name)
            # `from .base import Site` inside a package names the package's module, not the package
            and not module.startswith(f"{other}.")
        }
        for module, name in modules.items()
        if module != "__init__"
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("core.collectives") < order.index("styles.linear") < order.index("plans.plan")
    assert order.index("plans.plan") < order.index("plugin.accelerator")


def imported_tests(source: str) -> set[str]:
    """Test modules of this folder that a source imports: what tests share stands in tests/helpers/."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = (getattr(node, "module", None) or "").split(".")
            names |= {*module, *(part for alias in node.names for part in alias.name.split("."))}
    return names & {path.stem for path in TESTS.rglob("test_*.py")}


def test_no_test_imports_a_test():
    sources = {path.relative_to(TESTS).as_posix(): path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    assert {"conftest.py", "helpers/ranks.py", "system/test_traps.py"} <= sources.keys()
    assert {file: found for file, source in sources.items() if (found := imported_tests(source))} == {}


@pytest.mark.parametrize(
    "source", ["from . import test_plan", "def f():\n    from .test_plan import x", "import tests.plans.test_plan"]
)
def test_an_import_of_a_test_is_found(source):
    assert imported_tests(source) == {"test_plan"}
    assert imported_tests("from accelerate.test_utils import training") == set()


def test_collectives_are_called_in_the_files_listed_here_and_nowhere_else():
    assert {file for file, source in SOURCES.items() if called_collectives(source)} == CALL_COLLECTIVES.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.all_reduce(x)",
        "from torch import distributed as d\nd.all_reduce(x)",
        "from torch.distributed import all_reduce as quietly\nquietly(x)",
        "import torch.distributed._functional_collectives as funcol\nfuncol.all_reduce(x, 'sum', group)",
        "def f():\n    import torch.distributed as dist\n    call = dist.all_reduce\n    call(x)",
        "import torch\ntorch.ops._c10d_functional.all_reduce(x, 'sum', 'tp')",
    ],
)
def test_a_collective_is_found_however_it_is_called(source):
    assert called_collectives(source) == {"all_reduce"}


def test_other_things_of_that_name_are_not_collectives():
    assert called_collectives("import torch\naccelerator.gather(x)\nx.gather(0, i)\ntensor.scatter(1, i, 2)") == set()


def test_an_import_is_found_in_a_function_and_passed_over_for_types():
    source = (
        "def f():\n    import accelerate.utils\nif TYPE_CHECKING:\n    import transformers\nelse:\n    import peft"
    )
    assert {name.partition(".")[0] for name in imported(source, "plans/plan.py")} == {"accelerate", "peft"}
    assert "accel_tp_ddp.core.shard" in imported("from ..core.shard import ShardInfo", "styles/base.py")
    assert "accel_tp_ddp.styles.base" in imported("from .base import Site", "styles/linear.py")
