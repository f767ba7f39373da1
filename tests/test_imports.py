"""If this breaks: `--help` takes seconds, serving drags in the training stack, or a change here breaks a wing over there."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOUNS = {"answers", "calls", "conversation", "check", "jinja", "jinja_guard", "jinja_process", "rendering", "template", "reading", "cutting",
         "encoder", "tokenizer", "tying", "adapter",
         "peft_method", "trained_rows", "merging", "model", "anatomy", "quantize", "attention", "blockwise", "miniature", "vocabulary", "starting",
         "tokenizer_file"}
GROUND = {"threads", "class_paths", "command", "config_limits", "tokenizer_limits", "disk", "errors", "hub", "integrity", "library_warnings", "lock", "origin", "patterns",
          "ranges", "redaction", "samples"}
RIM = {"cli", "runs", "ending", "examples", "parser", "runconfig", "settings", "__main__", "__init__"}       # they may import everything
WINGS = {"data": set(), "training": {"data"}, "inference": set()}
ARROWS = {("training.callbacks", "inference.completion"), ("training.callbacks", "inference.sampling")}
NOUNS_FROM = {"conversation": set(), "check": {"conversation"}, "miniature": set(), "attention": {"blockwise"},
              "blockwise": set(), "jinja": {"jinja_guard", "jinja_process"}, "jinja_guard": set(), "jinja_process": set(),
              "calls": set(), "rendering": {"conversation", "calls", "jinja"},
              "template": {"conversation", "calls", "jinja", "rendering"}, "reading": {"rendering"}, "cutting": set(), "encoder": {"rendering", "reading", "cutting"},
              "answers": {"conversation", "rendering"},
              "tokenizer": {"answers", "check", "conversation", "jinja", "rendering", "template", "reading", "cutting", "encoder", "tokenizer_file"},
              "tokenizer_file": set(), "tying": set(),
              "vocabulary": set(), "peft_method": set(), "trained_rows": {"peft_method"},
              "adapter": {"peft_method", "trained_rows", "tying", "vocabulary"}, "merging": {"adapter"},
              "starting": {"adapter", "merging", "peft_method"}, "anatomy": {"adapter"}, "quantize": {"anatomy"},
              "model": {"attention", "anatomy", "quantize"}}
HOMES = {
    "peft": {"adapter", "peft_method"}, "AutoModelForCausalLM": {"model"}, "AutoConfig": {"model", "inference.export"},
    "tokenizers": {"tokenizer_file", "samples.make"}, "AutoTokenizer": {"tokenizer_file"}, "datasets": {"data.sources", "data.readers"},
    "torchmetrics": {"training.metrics"}, "triton": {"training.kernels"}, "cut_cross_entropy": {"training.borrowed"},
    "liger_kernel": {"training.borrowed"}, "litserve": set(),
    "deepspeed": {"training.deepspeed_setup", "training.weights", "training.reshard", "training.trial"},
}
HEAVY = ["torch", "transformers", "peft", "deepspeed", "datasets", "lightning", "litserve"]


def modules(package):
    """`part.name` inside the package -> its syntax tree."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / package).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


TREES = dict(modules("lit_llm"))


def imports(tree, *, top=False):
    """(module, name) of what is imported: anywhere, or when the module is loaded and not only for type checking."""
    nodes = [tree] if not top else [node for node in tree.body if not isinstance(node, ast.If)]
    for root in nodes:
        for node in ast.walk(root) if not top or not isinstance(root, ast.FunctionDef | ast.ClassDef) else ():
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, "imports are absolute"
                yield from ((node.module or "", alias.name) for alias in node.names)


def inner(tree, *, top=False):
    """Modules of lit_llm that a tree imports, without the package's name."""
    for module, name in imports(tree, top=top):
        if module.split(".")[0] == "lit_llm":
            whole = f"{module}.{name}".removeprefix("lit_llm").strip(".")
            yield whole if whole in TREES else module.removeprefix("lit_llm").strip(".")


def test_who_may_import_whom():
    for name, tree in TREES.items():
        wing = name.split(".")[0]
        for target in set(inner(tree)):
            other = target.split(".")[0]
            if wing in RIM or other in GROUND or wing == other or (name, target) in ARROWS:
                assert other != "cli" or name in ("__main__", "__init__"), f"{name} imports {target}"
                continue
            allowed = NOUNS_FROM.get(wing) if wing in NOUNS else NOUNS | WINGS[wing] if wing in WINGS else set()
            assert other in allowed, f"lit_llm.{name} must not import lit_llm.{target}"


def test_lit_llm_knows_no_server_and_the_server_no_training():
    for name, tree in TREES.items():
        assert "serve" not in {module.split(".")[0] for module, _ in imports(tree)}, name
    for name, tree in modules("serve"):
        others = {target.split(".")[0] for target in inner(tree)}
        assert others <= NOUNS | GROUND | {"inference"}, f"serve.{name} imports {others}"


def test_no_circles_when_modules_are_loaded():
    graph = {name: set(inner(tree, top=True)) - {name, ""} for name, tree in TREES.items()}
    order = TopologicalSorter(graph).static_order()             # raises CycleError, which names the circle
    assert set(order) >= set(TREES)


def test_one_home_for_each_third_party():
    for name, tree in TREES.items():
        for module, item in imports(tree):
            for key in {module.split(".")[0], item} & HOMES.keys():
                assert name in HOMES[key], f"lit_llm.{name} imports {key}, whose home is {HOMES[key] or 'serve'}"


@pytest.mark.parametrize("words", [[], ["--help"], ["chat", "--help"], ["export", "--help"], ["fitt"]], ids=" ".join)
def test_what_needs_no_model_is_quick(words):
    """Importing the package, reading help and mistyping a verb load no library that takes seconds."""
    run = f"import lit_llm.cli; lit_llm.cli.main({words})" if words else "import lit_llm"
    code = f"import sys\ntry:\n    {run}\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr
