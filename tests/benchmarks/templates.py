"""Count which chat templates are supported, and why others are not: `python -m tests.benchmarks.templates FOLDER ... --tokenizers DATA`.

Every .jinja file below the folders is used with a real vocabulary, minimind's for its own templates and Qwen2's for all
others, to which the control tokens of the template are added. Each record of `tests/conversation_records.py` is encoded
and compared with transformers' own rendering (`tests/rendering_oracle.py`). Prints a line per template, then the counts of
each verdict and each reason.
"""

import argparse
import collections
import re
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer, logging

from tests.conversation_records import KINDS
from tests.rendering_oracle import MISSED, OTHER, OTHERWISE, REFUSED, SERVED, UNTRUE, WRONG, judge
from tests.template_cases import fitted

LETTERS = {SERVED: "s", REFUSED: "-", WRONG: "X", MISSED: "m", UNTRUE: "u", OTHERWISE: "l", OTHER: "o"}


def vocabulary(tokenizers, name):
    """The folder of the real vocabulary that fits a template's name; Qwen2's where none does."""
    tokenizer_name = "minimind" if "minimind" in name else "qwen2"
    return str(tokenizers / tokenizer_name)


def main():
    """Print the table and the reasons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True, help="a folder of tokenizers' folders")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--only", default="", help="templates whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="each reason with its template and kinds")
    args = parser.parse_args()
    logging.set_verbosity_error()
    made, totals, reasons = {}, collections.Counter(), collections.defaultdict(list)
    print(" ".join(f"{number}:{kind}" for number, kind in enumerate(args.kinds, 1)))
    began = time.perf_counter()
    for file in sorted(file for folder in args.folders for file in folder.rglob("*.jinja") if args.only in str(file)):
        path = vocabulary(args.tokenizers, file.name.lower())
        if path not in made:
            made[path] = AutoTokenizer.from_pretrained(path)
        tokenizer = fitted(made[path], file.read_text(encoding="utf-8"))
        letters = ""
        for kind in args.kinds:
            verdict, reason = judge(tokenizer, KINDS[kind])
            letters += LETTERS[verdict]
            totals[verdict] += 1
            if verdict != SERVED:
                reasons[verdict, re.sub(r"\d+", "N", reason.split(" | ")[0])[:110]].append((file.name, kind, reason))
        print(f"{file.name:66} {Path(path).name:8} {letters}", flush=True)
    for (verdict, reason), cases in sorted(reasons.items(), key=lambda item: (item[0][0], -len(item[1]))):
        if args.verbose or verdict != REFUSED:
            print(f"{len(cases):5} {verdict}: {reason}")
            for name, kind, why in cases[:None if args.verbose else 4]:
                print(f"          {name} / {kind}: {why[-260:]}")
    can = totals[SERVED] + totals[MISSED]
    print(f"{sum(totals.values())} in {time.perf_counter() - began:.0f} s: " + ", ".join(
        f"{count} {verdict}" for verdict, count in totals.most_common()))
    print(f"served {totals[SERVED]} of {can} that can be shown ({totals[SERVED] / can:.1%}), {totals[WRONG]} wrong")
    return totals[WRONG] > 0


if __name__ == "__main__":
    sys.exit(main())
