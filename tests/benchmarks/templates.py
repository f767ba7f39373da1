"""Which chat templates are handled, and why not: `python tests/benchmarks/templates.py FOLDER TOKENIZER [NAME=PATH ...]`.

Every .jinja file below FOLDER is read with TOKENIZER, or with that of the first NAME which its path holds; the control
tokens that a template writes are added. Each kind of conversation of `tests/battery.py` is learned and held against the
oracle there. Prints a line a template: w learned whole, a answer by answer, - refused, X wrong; then the reasons.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer, logging

from lit_llm.errors import InputError
from tests.battery import BATTERY, check, fitted


def outcome(tokenizer, conversation):
    """(letter, reason)."""
    try:
        return check(tokenizer, conversation)[0].replace("p", "a"), ""
    except InputError as error:
        return "-", error.what
    except AssertionError as error:
        return "X", str(error).splitlines()[0]


def main(folder, default, *others):
    """Print the table and the reasons."""
    logging.set_verbosity_error()
    named = dict(other.split("=", 1) for other in others)
    made, totals, wrong = {}, dict.fromkeys("wa-X", 0), 0
    print(" ".join(f"{number}:{kind}" for number, kind in enumerate(BATTERY, 1)))
    for file in sorted(Path(folder).rglob("*.jinja")):
        path = next((path for name, path in named.items() if name in str(file).lower()), default)
        if path not in made:
            made[path] = AutoTokenizer.from_pretrained(path)
        tokenizer = fitted(made[path], file.read_text(encoding="utf-8"))
        found = {kind: outcome(tokenizer, conversation) for kind, conversation in BATTERY.items()}
        letters = "".join(letter for letter, _ in found.values())
        stops = " ".join(tokenizer.hf.convert_ids_to_tokens(tokenizer.stop_ids))
        print(f"{file.relative_to(folder)!s:66} {Path(path).name:12} {letters}  stops at {stops}", flush=True)
        reasons = {}
        for kind, (letter, reason) in found.items():
            totals[letter] += 1
            if reason:
                reasons.setdefault(reason[:150], []).append(kind)
        for reason, kinds in reasons.items():
            print(f"    {', '.join(kinds)}: {reason}")
        wrong += "X" in letters
    print(f"learned whole {totals['w']}, answer by answer {totals['a']}, refused {totals['-']}, wrong {totals['X']}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
