"""If this breaks: `--help` takes seconds, serving imports the training code, or packages depend on each other in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"errors", "rules", "disk", "hub", "names", "system"}      # every package may import these
RIM = {"cli", "__main__", "__init__"}                       # they may import everything
FROM = {"kernels": set(), "text": set(), "statistics": set(), "models": {"kernels"}, "data": {"text"}, "report": set(),
        "training": {"data", "text", "models", "kernels", "report", "statistics"}, "inference": {"text", "models", "kernels", "report"},
        "exports": {"inference", "text", "models", "kernels", "report"},
        "evaluation": {"inference", "training", "data", "text", "models", "kernels", "statistics"}}
CHAIN = ["records", "tokens", "rows", "stream"]             # of data: each may import those before it
MOST_FILES, MOST_LINES = 10, 360
HOMES = {
    "peft": {"models.adapters.adapter", "models.adapters.peft_method"}, "AutoModelForCausalLM": {"models.load"},
    "AutoConfig": {"models.load", "exports.command"}, "tokenizers": {"text.tokenizer_file", "samples.make"},
    "AutoTokenizer": {"text.tokenizer_file"}, "datasets": {"data.records.sources", "data.records.readers"},
    "filelock": {"data.tokens.cache"}, "torchmetrics": {"training.metrics"}, "triton": {"kernels.cross_entropy_triton"}, "cut_cross_entropy": {"kernels.borrowed"},
    "gguf": {"exports.gguf.file"}, "llama_cpp": {"exports.gguf.probe"}, "liger_kernel": {"kernels.borrowed"}, "litserve": set(), "llguidance": {"inference.guidance"},
    "rouge_score": {"evaluation.answers.scores"}, "sacrebleu": {"evaluation.answers.scores"}, "lm_eval": {"evaluation.tasks.harness"},
    "deepspeed": {"training.parallel.deepspeed_setup", "training.parallel.shards", "training.parallel.reshard"},
}
HEAVY = ["torch", "transformers", "peft", "deepspeed", "datasets", "lightning", "litserve"]


def modules(package):
    """`part.name` inside the package -> its syntax tree."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / package).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


TREES = dict(modules("lit_llm"))


def imports(tree):
    """(module, name) of all imports, including those in functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def inner(tree):
    """Modules of lit_llm that a tree imports, without the package's name."""
    for module, name in imports(tree):
        if module.split(".")[0] == "lit_llm":
            whole = f"{module}.{name}".removeprefix("lit_llm").strip(".")
            yield whole if whole in TREES else module.removeprefix("lit_llm").strip(".")


def test_who_may_import_whom():
    for name, tree in TREES.items():
        wing = name.split(".")[0]
        for target in set(inner(tree)):
            other = target.split(".")[0]
            if wing in RIM or wing == other or other in (*GROUND, ""):
                continue
            allowed = FROM.get(wing, set())
            assert other in allowed, f"lit_llm.{name} must not import lit_llm.{target}"


def test_the_data_are_a_chain():
    """What is beside the chain, such as the data module, may import all of it and is imported by none of it."""
    for name, tree in TREES.items():
        wing, _, rest = name.partition(".")
        place = rest.split(".")[0]
        if wing == "data" and place in CHAIN:
            before = CHAIN[:CHAIN.index(place) + 1]
            for target in inner(tree):
                assert not target.startswith("data.") or target.split(".")[1] in before, f"{name} imports {target}"


def test_streams_import_nothing_of_the_store():
    """A stream encodes tokens with the code of the store, and reads and writes no store."""
    of_stores = {f"data.tokens.{name}" for name in ("prepare", "store", "cache", "progress")}
    for name in ("encode", "workers"):
        assert not of_stores & set(inner(TREES[f"data.tokens.{name}"])), name
    for name, tree in TREES.items():
        if name.startswith("data.stream."):
            assert not of_stores & set(inner(tree)), name


def test_no_package_and_no_file_is_large():
    for folder in {path.parent for path in (ROOT / "lit_llm").rglob("*.py")}:
        files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(files) <= MOST_FILES, folder
        assert all(len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES for path in files)


def test_lit_llm_knows_no_server_and_the_server_no_training():
    for name, tree in TREES.items():
        assert "serve" not in {module.split(".")[0] for module, _ in imports(tree)}, name
    for name, tree in modules("serve"):
        others = {target.split(".")[0] for target in inner(tree)}
        assert others <= GROUND | {"text", "models", "inference"}, f"serve.{name} imports {others}"


def test_no_circles():
    """Imports within functions and for type checking count as well, because a reader follows all of them."""
    graph = {name: set(inner(tree)) - {name, ""} for name, tree in TREES.items()}
    order = TopologicalSorter(graph).static_order()             # raises CycleError, which names the circle
    assert set(order) >= set(TREES)


def test_one_home_for_each_third_party():
    for name, tree in TREES.items():
        for module, item in imports(tree):
            if module.split(".")[0] == "lit_llm":
                continue
            for key in {module.split(".")[0], item} & HOMES.keys():
                assert name in HOMES[key], f"lit_llm.{name} imports {key}, whose home is {HOMES[key] or 'serve'}"


SPLIT = {"ds_id", "ds_shape", "ds_numel", "ds_tensor", "ds_status", "full_tensor", "to_local", "redistribute", "DTensor", "_hp_mapping",
         "_z3_optimizer", "GatheredParameters", "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state"}


STRATEGIES = {f"training.parallel.{name}" for name in ("distribution", "zero", "fsdp")}


def words_of(tree):
    """Names and strings of a tree, not of its prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_few_functions_of_the_data_take_a_source():
    """A source is read in few places: for another field of it, one looks at these alone."""
    takers = [f"{name}.{node.name}" for name, tree in TREES.items() if name.startswith("data.") for node in ast.walk(tree)
              if isinstance(node, ast.FunctionDef) and "source" in [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]]
    assert 1 <= len(takers) <= 6, takers


def test_one_module_knows_how_a_weight_is_split():
    """Other modules use `shards.py`: their own checks would be wrong for another kind of sharding."""
    probes = {name: set(words_of(tree)) & SPLIT for name, tree in TREES.items()}
    assert {name for name, matches in probes.items() if matches} == {"training.parallel.shards", "system.private.deepspeed"}


def test_strategies_are_asked_and_not_recognized():
    """What depends on the strategy is an answer of `distribution.py`: a new strategy is then one file."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or name in STRATEGIES:
                continue
            if node.func.id == "isinstance":
                kinds = [word for word in words_of(node.args[1]) if word.endswith("Strategy")]
                assert not kinds, f"{name}:{node.lineno} asks whether a strategy is a {kinds}"
            if node.func.id in ("getattr", "hasattr"):
                assert not any(word in ("strategy", "deepspeed_engine") for part in node.args[:2] for word in words_of(part)), \
                    f"{name}:{node.lineno} probes a strategy"


@pytest.mark.parametrize("words", [[], ["--help"], ["chat", "--help"], ["export", "--help"], ["fitt"]], ids=" ".join)
def test_what_needs_no_model_is_quick(words):
    """Importing the package, reading help and mistyping a verb load no library that takes seconds."""
    run = f"import lit_llm.cli.main; lit_llm.cli.main.main({words})" if words else "import lit_llm"
    code = f"import sys\ntry:\n    {run}\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr


def defined(path):
    """Names that a module binds anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return ({node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
            | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            | {alias.asname or alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
               for alias in node.names})


@pytest.mark.parametrize("folder", ["lit_llm", "serve", "tests", "notebooks"])
def test_imported_names_exist(folder):
    """Also those imported in functions and in benchmarks, which no other test may run."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] not in ("lit_llm", "serve", "tests"):
                continue
            place = ROOT.joinpath(*node.module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            if file == ROOT / "lit_llm" / "__init__.py":        # its names are looked up when they are asked for
                continue
            names = defined(file) if file.is_file() else set()
            names |= {inner.stem for inner in place.glob("*")} if place.is_dir() else set()
            missing = [alias.name for alias in node.names if alias.name not in names]
            assert not missing, f"{path.relative_to(ROOT)}:{node.lineno}: {node.module} has no {missing}"
