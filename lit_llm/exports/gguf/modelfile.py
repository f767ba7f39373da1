"""Write an Ollama Modelfile beside a GGUF file: the file, how a conversation is rendered, and where answers stop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.exports.gguf.families import Description, Metadata
from lit_llm.text.conversation import Conversation, Message, Role

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
USUAL_CONTEXT = 4096                                # tokens that Ollama takes by default
# Conversations that a stated template must render exactly: several turns, spaces around contents, no system message.
PROOFS: tuple[tuple[Role, ...], ...] = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))
CONTENTS = ("One two.", "  spaces around \n", "三 四\n\nfive", "six")


def write(folder: Path, name: str, tokenizer: Any, described: Description, own: Metadata) -> None:
    """Write the Modelfile.

    Args:
        folder: The folder of the GGUF file.
        name: The file.
        tokenizer: The model's tokenizer with its chat template.
        described: The model in llama.cpp's terms.
        own: The tokenizer's metadata.
    """
    lines = [f"# ollama create {name.rsplit('-', 1)[0].lower()} -f Modelfile", f"FROM ./{name}"]
    begins = tokenizer.hf.bos_token if own["tokenizer.ggml.add_bos_token"][1] else ""
    template = go_template(tokenizer.template, begins or "")
    if template is None:
        lines += ["# The chat template in the GGUF file has rules that Ollama's templates do not have, so none is",
                  "# stated here. llama.cpp's server uses the one in the file."]
    else:
        lines.append(f'TEMPLATE """{template}"""')
    stops = [tokenizer.hf.convert_ids_to_tokens(token) for token in tokenizer.stop_ids]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    context = int(described.metadata[f"{described.family.arch}.context_length"][1])
    if context < USUAL_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    disk.replace_text(folder / "Modelfile", "\n".join(lines) + "\n")


def go_template(template: Any, begins: str = "") -> str | None:
    """A chat template in Ollama's language, or null if it is more than a text around each message.

    Args:
        template: The project's chat template.
        begins: Text at the beginning that Ollama adds itself (BOS); left out.

    The texts around messages are found by rendering, and the result must render every conversation of `PROOFS` exactly.
    """
    try:
        around = {role: _around(template, role) for role in ROLES}
        opening = _render(template, [("user", "a")], True)[len(_render(template, [("user", "a")], False)):]
        start = _start(template)
    except (InputError, ValueError):
        return None
    for roles in PROOFS:
        messages = list(zip(roles, CONTENTS, strict=False))
        stated = start + "".join(around[role][0] + content + around[role][1] for role, content in messages) + opening
        try:
            if _render(template, messages, True) != stated:
                return None
        except InputError:
            return None
    texts = [start, opening, *(text for pair in around.values() for text in pair)]
    if any('"""' in text or "{{" in text or "}}" in text for text in texts) or not start.startswith(begins):
        return None
    cases = "{{ else ".join(f'if eq .Role "{role}" }}}}{around[role][0]}{{{{ .Content }}}}{around[role][1]}'
                            for role in ROLES)
    return f"{start.removeprefix(begins)}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{opening}"


def _render(template: Any, messages: Sequence[tuple[Role, str]], opened: bool) -> str:
    conversation = Conversation(tuple(Message(role, content) for role, content in messages))
    return str(template.render(conversation, generation_prompt=opened).text)


def _around(template: Any, role: Role) -> tuple[str, str]:
    """The texts before and behind the content of a message that is not the first."""
    before: list[tuple[Role, str]] = [("user", "u")] if role == "assistant" else [("user", "u"), ("assistant", "a")]
    if role == "system":
        shared, rest = len(_start(template)), len(_render(template, [("user", "u")], False))
        whole = _render(template, [("system", "\x00"), ("user", "u")], False)
        return _cut(whole[shared:len(whole) - rest + shared])
    return _cut(_render(template, [*before, (role, "\x00")], False)[len(_render(template, before, False)):])


def _cut(text: str) -> tuple[str, str]:
    left, right = text.split("\x00")                # ValueError where the content occurs twice or not at all
    return left, right


def _start(template: Any) -> str:
    """The text before the first message: what a first question has more than a later one."""
    first = _cut(_render(template, [("user", "\x00")], False))
    later = _around(template, "user")
    if first[1] != later[1] or not first[0].endswith(later[0]):
        raise ValueError("the first question is rendered in another way")
    return first[0][:len(first[0]) - len(later[0])]
