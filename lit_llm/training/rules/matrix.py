"""Print the table of rules as a support matrix in Markdown, and keep the copy in `lit_llm/training/README.md` current.

Run `python -c "from lit_llm.training.rules import matrix; matrix.write()"` after a change of the table.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_llm import disk
from lit_llm.rules import Rule
from lit_llm.training.parallel import named
from lit_llm.training.parallel.distribution import Distribution
from lit_llm.training.rules.table import ALL, STRATEGIES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support matrix: written by rules/matrix.py -->\n", "<!-- end of the support matrix -->\n"
_EXAMPLE = SimpleNamespace(                         # values of a run that the reasons quote
    device="cpu", precision="bf16-mixed", old_precision="32-true", written_with="another strategy",
    read_with="this one", strategy=SimpleNamespace(configured_stage=0),
    sources=[SimpleNamespace(weight=2.0)], module=SimpleNamespace(
        schedule="cosine", cross_entropy="liger", way=SimpleNamespace(why_own_logits="its forward pass adds to them")))


def as_markdown() -> str:
    """Two tables: which features each strategy supports, and all other incompatible pairs."""
    columns: dict[str, Distribution] = {"one device, `ddp`": Distribution()}
    columns["`deepspeed_stage_1`, `_2`"], columns["`deepspeed_stage_3`"], columns["`fsdp2`"] = (
        named.strategy(name) for name in ("deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    by_strategy = [rule for rule in ALL if rule.second in STRATEGIES]
    for first in dict.fromkeys(rule.first for rule in by_strategy):
        mine = [rule for rule in by_strategy if rule.first == first]
        lines.append(f"| {first} | " + " | ".join(_cell(mine, strategy) for strategy in columns.values()) + " |")
    lines += ["", "| feature | incompatible with | reason |", "|---|---|---|"]
    for rule in ALL:
        if rule.second not in STRATEGIES:
            why = rule.why.format(s=_EXAMPLE) + ("" if rule.refused else " (a warning)")
            lines.append(f"| {rule.first} | {rule.second} | {why} |")
    return "\n".join(lines) + "\n"


def _cell(rules: list[Rule], strategy: Distribution) -> str:
    """Whether a strategy supports a feature, with one process and with several."""
    alone, together = (any(STRATEGIES[rule.second](strategy, processes) for rule in rules) for processes in (1, 2))
    return "no" if alone else "one process only" if together else "yes"


def write() -> None:
    """Replace the support matrix in the README."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    disk.replace_text(README, before + BEGIN + as_markdown() + END + rest.partition(END)[2])
