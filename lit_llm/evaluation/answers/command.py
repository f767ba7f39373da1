"""The `generate` verb: read prompts, generate the answers that are missing, score them, print a table."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.evaluation.answers import prompts as prompt_file
from lit_llm.evaluation.answers import scores as scoring
from lit_llm.evaluation.answers import summary
from lit_llm.evaluation.answers.journal import Journal, Line
from lit_llm.evaluation.answers.models import Answering, LocalModel, Request, ServedModel, requests
from lit_llm.evaluation.answers.prompts import Prompt
from lit_llm.evaluation.answers.scores import Scorer
from lit_llm.evaluation.answers.summary import Answers
from lit_llm.evaluation.progress import Progress
from lit_llm.inference.chat.remote import check_options
from lit_llm.inference.chat.session import message_of
from lit_llm.inference.completion import Completion
from lit_llm.inference.sampling import SamplingParams
from lit_llm.system.lock import Lock
from lit_llm.text.conversation import Document

USAGE = "python -m lit_llm generate FOLDER --data prompts.jsonl --out answers.jsonl"


def generate(
    models: list[str] | None = None,
    data: str | None = None,
    out: str | None = None,
    *,
    url: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: list[str] | None = None,
    seed: int = 0,
    n: int = 1,
    scores: list[str] | None = None,
    extract: str | None = None,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    overlong: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | Literal["auto"] = "auto",
    max_running: int = 32,
    template_args: dict[str, bool | int | float | str | list[str] | None] | None = None,
) -> str:
    """Answer the prompts of a file: generate FOLDER --data FILE --out FILE. Several folders are compared.

    A prompt is a record with `prompt`, `messages` or `conversations`, a question of any other form that `fit` reads, or
    a `text` to continue. The last answer of a training record is held back and becomes the reference, with which the
    answer is scored. The output has one line for each answer in the order of the input; of several models, one file
    each. A killed run is continued by the same command. The figures are printed, and written beside the output.

    Args:
        models: What answers, typed without an option: a run (its export/ is used), a folder that transformers loads,
            or a hub id. With url, names of the server's models; null takes its first one.
        data: File or folder with the prompts, as in `data.sources`.
        out: File for the answers. Of several models, the name of each is inserted: answers.MODEL.jsonl.
        url: Address of a server with OpenAI's API, such as http://127.0.0.1:8000/v1, instead of a folder. Its key is
            read from $LIT_LLM_API_KEY or $OPENAI_API_KEY.
        max_tokens: Maximum number of new tokens of an answer; less where the context has less room.
        temperature: 0 always picks the most likely token; 1 samples from the model's own distribution.
        top_p: Sample from the most likely tokens whose probabilities sum to this value; 1 keeps all.
        top_k: Sample from this many most likely tokens; 0 keeps all.
        min_p: Sample from tokens with at least this share of the most likely token's probability; 0 keeps all.
        stop: An answer ends before the first of these strings.
        seed: Seed of sampling. The same seed, prompts and settings give the same file, whatever is computed together,
            as long as rounding does not decide between two tokens.
        n: Number of answers to each prompt, at temperatures above 0.
        scores: Which scores are computed where there is a reference: exact, contains, extract, rougeL, chrf. Null is
            all of them; the last two need `pip install 'lit_llm[metrics]'`.
        extract: A regular expression. Its last match in the answer, or its first group, is compared with that in the
            reference; numbers are compared as numbers.
        format: As in `data.sources`.
        columns: As in `data.sources`: standard key -> the record's key.
        split: As in `data.sources`.
        limit: Only this many prompts, from the beginning; null for all.
        overlong: A prompt that leaves no room for an answer is an error, or is left out and counted (skip).
        overwrite: Replace answers that the output has for other prompts, models or settings.
        adapter: Folder of a PEFT adapter to apply to the model.
        device: `auto` uses the GPU if there is one; or cpu, cuda, mps.
        dtype: `auto` uses the checkpoint's dtype; or float32, bfloat16, float16.
        threads: Number of CPU threads; `auto` measures which number is fastest.
        max_running: Answers that are generated together.
        template_args: Values of the chat template's variables, such as `{enable_thinking: false}`; null uses those of
            the training.

    Returns:
        The figures as text.

    Raises:
        InputError: No such model or file, a bad record (with its line), or an output with other answers.
    """
    if not models and url is None:
        raise InputError("no model was given", where="generate", fix=USAGE)
    if data is None or out is None:
        raise InputError("no file was given", where="data" if data is None else "out", fix=USAGE)
    params = SamplingParams(max_tokens, temperature, top_p, top_k, tuple(stop or ()), seed, min_p=min_p)
    if n > 1 and params.greedy:
        raise InputError("at temperature 0 all answers to a prompt are the same", where="n",
                         fix="set --temperature, or leave n out")
    chosen, missing = scoring.chosen(scores, extract)
    scorer = Scorer(chosen, extract)
    prompts = prompt_file.read(data, format=format, columns=columns, split=split, limit=limit,
                               template_args=template_args if url is None else None)
    _check_references(prompts, scorer, missing)
    answering = _answering(models or [], url, {"adapter": adapter, "device": device, "dtype": dtype,
                                               "threads": threads}, max_running, template_args)
    files = _files(Path(out), [model.name for model in answering])
    every = [_answer(model, prompts, params, n, scorer, file, skip=overlong == "skip", overwrite=overwrite)
             for model, file in zip(answering, files, strict=True)]
    settings = {"data": data, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
                "min_p": min_p, "stop": list(stop or ()), "seed": seed, "n": n, "extract": extract}
    return _summarised(every, scorer, settings, files, Path(out).with_suffix(".summary.json"))


def _check_references(prompts: Sequence[Prompt], scorer: Scorer, missing: Sequence[str]) -> None:
    """Before anything is generated: refuse references that cannot be scored, and name the scores that are missing.

    Raises:
        InputError: Nothing can be extracted from a reference; located at its record.
    """
    references = [(prompt.reference, prompt.place) for prompt in prompts if prompt.reference is not None]
    for reference, place in references:
        scorer.check_reference(reference, place)
    if missing and references:
        _note(f"{', '.join(missing)} are not computed: pip install 'lit_llm[metrics]'")


def _answering(models: Sequence[str], url: str | None, options: dict[str, Any], max_running: int,
               template_args: dict[str, Any] | None) -> list[Answering]:
    """The models of this machine, or those of a server, which has its own options."""
    if url is None:
        return [LocalModel(name, max_running=max_running, template_args=template_args, **options) for name in models]
    check_options(**options)
    served: Sequence[str | None] = models or [None]
    return [ServedModel(url, name, max_running=max_running, template_args=template_args) for name in served]


def _summarised(every: Sequence[Answers], scorer: Scorer, settings: dict[str, Any], files: Sequence[Path],
                target: Path) -> str:
    """Write the figures of all models, and return them as a table."""
    figures = [summary.figures(answers, scorer.names) for answers in every]
    differences = [summary.differences(every[0], other, scorer.names) for other in every[1:]]
    disk.replace_text(target, json.dumps({"settings": settings, "models": figures, "differences": differences},
                                         indent=2, ensure_ascii=False) + "\n")
    _note(f"wrote {', '.join(map(str, [*files, target]))}")
    return summary.table(figures, differences, scorer.names)


def _answer(model: Answering, prompts: Sequence[Prompt], params: SamplingParams, n: int, scorer: Scorer, file: Path, *,
            skip: bool, overwrite: bool) -> Answers:
    """Generate what is missing in the output of one model, and complete it."""
    if note := getattr(model, "note", ""):
        _note(note)
    wanted = requests(prompts, model, params, n, skip_overlong=skip)
    skipped = len(prompts) - len({request.prompt.index for request in wanted})
    if skipped:
        _note(f"{model.name}: {skipped:,} of {len(prompts):,} prompts are left out, because they leave no room for an "
              "answer")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock()
    if refusal := lock.take(file.with_name(file.name + ".lock"), "out", file):
        raise refusal
    try:
        journal = Journal(file, [request.fingerprint for request in wanted], overwrite=overwrite)
        missing = set(journal.missing)
        progress = Progress(model.name, len(wanted), "answers", earlier=len(wanted) - len(missing))
        try:
            for request, answer in model.answers([request for request in wanted if request.fingerprint in missing]):
                journal.add(_line(request, answer))
                progress.add(answer.completion_tokens, 1)
        finally:
            journal.close()
        seconds = progress.end(always=True)
        more = {request.fingerprint: _scored(request, n, journal.lines[request.fingerprint], scorer)
                for request in wanted}
        lines = journal.finish(more)
    finally:
        lock.release()
    return Answers(model.name, str(file), lines, skipped, progress.tokens, seconds)


def _line(request: Request, answer: Completion) -> Line:
    """An answer as it is appended; reasoning is kept apart, and what a document continues is verbatim."""
    message = message_of(answer.text)
    text, reasoning = message.content, message.reasoning_content
    if isinstance(request.prompt.content, Document):
        text, reasoning = answer.text, None
    return {"index": request.prompt.index, **request.prompt.to_json(), "answer": text,
            **({"reasoning": reasoning} if reasoning else {}), "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
            "fingerprint": request.fingerprint}


def _scored(request: Request, n: int, line: Line, scorer: Scorer) -> dict[str, Any]:
    """What is set in each line when all answers are there: its place in the input, its reference and scores."""
    prompt, out = request.prompt, dict[str, Any](index=request.prompt.index)
    if prompt.id is not None:
        out["id"] = prompt.id
    if n > 1:
        out["sample"] = request.sample
    if prompt.reference is not None:
        out["reference"] = prompt.reference
        out["scores"] = scorer(line["answer"], prompt.reference)
    return out


def _files(out: Path, names: Sequence[str]) -> list[Path]:
    """The output of each model.

    >>> [file.name for file in _files(Path("a.jsonl"), ["runs/one/export", "gpt2"])]
    ['a.runs-one-export.jsonl', 'a.gpt2.jsonl']
    """
    if out.suffix not in (".jsonl", ".ndjson"):
        raise InputError("the answers are JSON lines", where="out", fix="name a file such as answers.jsonl")
    if len(names) == 1:
        return [out]
    labels: list[str] = []
    for name in names:
        label = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "model"
        labels.append(label if label not in labels else f"{label}-{len(labels) + 1}")
    return [out.with_name(f"{out.stem}.{label}{out.suffix}") for label in labels]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
