"""The `evaluate` verb: find the models and the texts, score them, compare, print and write."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_llm.data.tokens.encode import OnBadRecord
from lit_llm.errors import InputError
from lit_llm.evaluation import material, passes, rolling, stored, table
from lit_llm.evaluation.material import Material, Texts
from lit_llm.evaluation.result import Difference, Result, difference, incomparable
from lit_llm.evaluation.scoring.local import LocalModel, context_length
from lit_llm.evaluation.scoring.remote import ServedModel
from lit_llm.evaluation.scoring.subject import Subject, find
from lit_llm.text.tokenizer import Tokenizer, TrainOn

MOST = 4096                                         # tokens of a window unless more are asked for
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
    names = models or []
    subjects = [find(name) for name in names if not stored.is_result(name)]
    earlier = {name: stored.read(name) for name in names if stored.is_result(name)}
    if not names and url is None:
        raise InputError("no model was given", where="evaluate", fix="python -m lit_llm evaluate FOLDER --data FILE")
    if tasks is not None:
        return _of_tasks(subjects, tasks, chat=chat, num_fewshot=num_fewshot, limit=limit, dtype=dtype,
                         quantize=quantize, device=device, out=out, data=data, base=base, url=url, results=earlier)
    reference = find(base) if base is not None else None
    if url is not None and not subjects and tokenizer is None:
        raise InputError("the tokenizer of the server's model is not known", where="tokenizer",
                         fix="give its folder: --tokenizer FOLDER")
    everyone = [*subjects, *([reference] if reference else [])]
    results: list[Result] = []
    differences: list[Difference] = []
    if everyone or url is not None:
        width = seq_len or _smallest_context(everyone, tokenizer) - (url is not None)   # a server adds a token
        texts = _Texts(rolling, width, data, subjects[0] if subjects else None, limit=limit, seq_len=seq_len,
                       stride=stride, train_on=train_on, on_bad_record=on_bad_record, format=format, columns=columns,
                       document=document, split=split)
    for name in names:
        if name in earlier:
            results += earlier[name]
            continue
        subject = next(candidate for candidate in subjects if candidate.name == name)
        model = LocalModel(subject, dtype=dtype, quantize=quantize, device=device)
        measured = passes.measure(model, name, texts.of(subject.tokenizer), batch_size=batch_size,
                                  with_base=base is None)
        del model
        results += measured
        differences += [difference(measured[0], before) for before in measured[1:]]
    if url is not None:
        served = ServedModel(url)
        results += passes.measure(served, url, texts.of(tokenizer or subjects[0].tokenizer), batch_size=batch_size)
    if reference is not None:
        model = LocalModel(reference, dtype=dtype, quantize=quantize, device=device)
        measured = passes.measure(model, f"{base} (base)", texts.of(reference.tokenizer), batch_size=batch_size)
        before = replace(measured[0], is_base=True)
        differences.append(difference(results[0], before))
        results.append(before)
    differences += _with_first(results)
    if out is not None:
        stored.write(out, results, differences)
        print(f"wrote {out}", file=sys.stderr)
    return table.of(results, differences)


def _of_tasks(subjects: Sequence[Subject], tasks: list[str], *, data: object, base: object, url: object,
              results: object, **options: Any) -> str:
    """Evaluate on tasks; what has no effect there is refused."""
    for name, value in (("data", data), ("base", base), ("url", url), ("models", results)):
        if value:
            raise InputError("it has no effect with tasks, which ask folders of models", where=name, fix="leave it out")
    from lit_llm.evaluation.tasks.command import evaluate_tasks

    return evaluate_tasks(subjects, tasks, **options)


def _with_first(results: Sequence[Result]) -> list[Difference]:
    """Each further model compared with the first one.

    Raises:
        InputError: A stored result was measured on other data.
    """
    models = [result for result in results if not result.is_base]
    out = []
    for result in models[1:]:
        if result.measured["fingerprints"]["data"] == models[0].measured["fingerprints"]["data"] and incomparable(
                result, models[0]):
            print(f"note: {result.name} has another tokenizer than {models[0].name}, so the two are not compared "
                  "document by document; compare bits per byte", file=sys.stderr)
            continue
        out.append(difference(result, models[0]))
    return out


def _smallest_context(subjects: Sequence[Subject], tokenizer: str | None) -> int:
    lengths = [context_length(subject) for subject in subjects]
    if not lengths and tokenizer is not None and (Path(tokenizer) / "config.json").is_file():
        lengths = [context_length(find(tokenizer))]
    if not lengths:
        raise InputError("the context length of the server's model is not known", where="seq_len",
                         fix="set it: --seq_len 2048")
    return min(MOST, *lengths)


class _Texts:
    """The texts of an evaluation, tokenized once for each tokenizer."""

    def __init__(self, kind: Convention, width: int, data: list[str] | None, first: Subject | None, *,
                 limit: int | None, seq_len: int | None, stride: int | None, train_on: TrainOn | None,
                 on_bad_record: OnBadRecord | None, **of_sources: str | dict[str, str] | None) -> None:
        self._kind, self._width, self._limit = kind, width, limit
        self._made: dict[str, Material] = {}
        chosen = {"train_on": train_on, "on_bad_record": on_bad_record, "stride": stride}
        set_options = {key: value for key, value in chosen.items() if value is not None}
        if data:
            self._texts: Texts = material.of_paths(data, limit=limit, **set_options, **of_sources)   # type: ignore[arg-type]
        elif first is not None and first.run is not None:
            self._texts = material.of_run(first.run, limit=limit, seq_len=seq_len, **chosen)
        else:
            raise InputError("no texts were given", where="data",
                             fix="python -m lit_llm evaluate FOLDER --data FILE; only a run has data of its own")

    def of(self, folder: str) -> Material:
        """The texts for the tokenizer of a folder or hub id."""
        if folder not in self._made:
            if self._kind == "no":
                self._made[folder] = self._texts.with_tokenizer(folder, self._width)
            else:
                sources = self._texts.options.get("val_sources")
                if not sources:
                    raise InputError("the run has no validation data of its own", where="data",
                                     fix="give texts: --data FILE")
                self._made[folder] = rolling.material(sources, Tokenizer.load(folder), self._width, self._kind,
                                                      self._limit)
        return self._made[folder]
