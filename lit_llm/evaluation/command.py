"""The `evaluate` verb: its options, and what can be refused before libraries are imported, which takes seconds."""

import sys
from pathlib import Path
from typing import Any, Literal

from lit_llm import names
from lit_llm.data.tokens.encode import OnBadRecord
from lit_llm.errors import InputError
from lit_llm.inference.loading import model_folder
from lit_llm.text.answers import TrainOn

Convention = Literal["no", "text", "wikitext"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def evaluate(
    models: list[str] | None = None,
    data: list[str] | None = None,
    *,
    base: str | None = None,
    url: str | None = None,
    tasks: list[str] | None = None,
    chat: bool = False,
    num_fewshot: int | None = None,
    tokenizer: str | None = None,
    rolling: Convention = "no",
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    train_on: TrainOn | None = None,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    document: str = "auto",
    split: str = "train",
    on_bad_record: OnBadRecord | None = None,
    dtype: Dtype = "auto",
    quantize: Literal["nf4", "int8"] | None = None,
    device: str = "auto",
    out: str | None = None,
) -> str:
    """Measure perplexity on texts: evaluate FOLDER --data FILE. Several folders are compared with the first one.

    Prints nll, perplexity, bits per byte and per character, and token accuracy, each with its count and a 95 %
    bootstrap interval over documents or conversations. An adapter is also compared with its base, which is scored in
    the same pass.

    Args:
        models: What is measured, typed without an option: a folder that transformers loads, an adapter, a checkpoint, a
            run (its best checkpoint), a hub id, or a file that --out wrote earlier, on the same data.
        data: Files or folders with documents or conversations, recognised as `fit` does: --data a.jsonl b.txt. Null
            takes the validation data of the first model's run, with the settings of that run.
        base: The model before a full fine-tuning, which the first model is compared with.
        url: Also measure the model of a server that gives log-probabilities of a prompt, such as
            http://127.0.0.1:8000/v1; token ids are sent. Its key is read from $LIT_LLM_API_KEY or $OPENAI_API_KEY.
        tasks: Tasks of lm-evaluation-harness instead of texts: folders with task files, whose data may be local files,
            or names; `pip install 'lit_llm[tasks]'`. The figures are those of its own model for transformers.
        chat: Ask the tasks' questions through the model's chat template.
        num_fewshot: Examples before each question of a task; null for the number of the task.
        tokenizer: Folder or hub id of the server's tokenizer; null takes that of the first model.
        rolling: Word-level perplexity in the convention of the literature, equal to lm-evaluation-harness: every
            token is predicted in rolling windows, and the NLL is divided by the words of the raw text. `wikitext`
            splits WikiText into articles and undoes its tokenization first; `text` takes documents as they are.
        seq_len: Tokens of a window; null takes the smallest context of the models, at most 4,096, and with url one
            less.
        stride: Tokens by which the windows of a long document advance, below seq_len: each token is scored once, with
            at least `seq_len - stride` tokens before it. Null is `seq_len - 1`, or the setting of the run.
        batch_size: Packed sequences that are computed together. The figures do not depend on it.
        limit: Only this many documents, conversations or questions, from the beginning; null for all.
        train_on: Scored tokens of a conversation: every answer (assistant), the last answer (last), or every token
            (all); null is assistant, or the setting of the run whose data are taken.
        format: As in `data.sources`.
        columns: As in `data.sources`: standard key -> the record's key.
        document: As in `data.sources`: how text files are split into documents.
        split: As in `data.sources`.
        on_bad_record: Stop at the first bad record (error), or set it aside (quarantine); null is error, or the setting
            of the run.
        dtype: `auto` uses the dtype of the stored weights.
        quantize: Type of the numbers of linear layers: nf4 or int8 (bitsandbytes); null uses that of the training.
        device: `auto` uses the GPU if there is one; or cpu, cuda, mps.
        out: File for the results as JSON, with the sums of each document.

    Returns:
        The text to print.

    Raises:
        InputError: No such model or text, a bad record, models that cannot be compared, or a server without
            log-probabilities.
    """
    typed = models or []
    if not typed and url is None:
        raise InputError("no model was given", where="evaluate", fix="python -m lit_llm evaluate FOLDER --data FILE")
    results = [name for name in typed if _is_result(name)]
    if tasks is not None:
        _check_unused({"data": data, "base": base, "url": url, "models": results})
    for name in [*typed, *([base] if base is not None else [])]:
        if not names.path_of(name).exists():
            model_folder(name)
    loading = {"dtype": dtype, "quantize": quantize, "device": device}
    if tasks is not None:
        return _of_tasks(typed, tasks, chat=chat, num_fewshot=num_fewshot, limit=limit, out=out, **loading)
    from lit_llm.evaluation import stored, table
    from lit_llm.evaluation.comparison import Comparison

    compared = Comparison(typed, results, base=base, url=url, tokenizer=tokenizer, loading=loading)
    compared.choose_texts(rolling, data, limit=limit, seq_len=seq_len, stride=stride, train_on=train_on,
                          on_bad_record=on_bad_record, format=format, columns=columns, document=document, split=split)
    compared.measure(batch_size)
    if out is not None:
        stored.write(out, compared.results, compared.differences)
        print(f"wrote {out}", file=sys.stderr)
    return table.of(compared.results, compared.differences)


def _is_result(name: str) -> bool:
    """Whether a name is that of a stored result rather than of a model."""
    return name.endswith(".json") and Path(name).expanduser().is_file()


def _check_unused(options: dict[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise InputError("it has no effect with tasks, which ask folders of models", where=name, fix="leave it out")


def _of_tasks(models: list[str], tasks: list[str], **options: Any) -> str:
    from lit_llm.evaluation.scoring.subject import find
    from lit_llm.evaluation.tasks.command import evaluate_tasks

    return evaluate_tasks([find(name) for name in models], tasks, **options)
