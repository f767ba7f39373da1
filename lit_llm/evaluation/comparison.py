"""Measure the models of an evaluation on the same texts, and compare them document by document."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_llm.errors import InputError
from lit_llm.evaluation import material, passes, rolling, stored
from lit_llm.evaluation.material import Material, Texts
from lit_llm.evaluation.result import Difference, Result, difference, incomparable
from lit_llm.evaluation.scoring.local import LocalModel, context_length
from lit_llm.evaluation.scoring.remote import ServedModel
from lit_llm.evaluation.scoring.subject import Subject, find
from lit_llm.text.tokenizer import Tokenizer

MOST = 4096                                         # tokens of a window unless more are asked for
Convention = Literal["no", "text", "wikitext"]


class Comparison:
    """Models, their results and the differences between them; the first model is the one others are compared with.

    Args:
        names: Models and stored results, as the user typed them.
        results: Those of them that are stored results.
        base: The model before a full fine-tuning of the first model; null without one.
        url: Address of a server whose model is measured as well; null without one.
        tokenizer: Folder or hub id of the server's tokenizer; null takes that of the first model.
        loading: Arguments of `LocalModel`.

    Raises:
        InputError: No such model, a file that is no result, or a server whose tokenizer is not known.
    """

    def __init__(self, names: Sequence[str], results: Sequence[str], *, base: str | None, url: str | None,
                 tokenizer: str | None, loading: dict[str, Any]) -> None:
        self._names, self._base_name, self._url, self._loading = names, base, url, loading
        self._subjects = {name: find(name) for name in names if name not in results}
        self._stored = {name: stored.read(name) for name in results}
        self._base = find(base) if base is not None else None
        self._first = next(iter(self._subjects.values()), None)
        self._tokenizer = tokenizer or (self._first.tokenizer if self._first else None)
        if url is not None and self._tokenizer is None:
            raise InputError("the tokenizer of the server's model is not known", where="tokenizer",
                             fix="give its folder: --tokenizer FOLDER")
        self._texts: _Texts | None = None
        self.results: list[Result] = []
        self.differences: list[Difference] = []

    def choose_texts(self, kind: Convention, data: list[str] | None, *, seq_len: int | None, **options: Any) -> None:
        """Set what the models are measured on; without a model to measure there is nothing to set.

        Args:
            kind: The convention of word-level perplexity, or no.
            data: Files or folders; null for the validation data of the first model's run.
            seq_len: Tokens of a window; null takes the smallest context.
            options: How the texts are read, as in `evaluate`.

        Raises:
            InputError: There are no texts.
        """
        models = [*self._subjects.values(), *([self._base] if self._base else [])]
        if models or self._url is not None:
            width = seq_len or _smallest_context(models, self._tokenizer) - (self._url is not None)  # a server adds one
            self._texts = _Texts(kind, width, data, self._first, seq_len=seq_len, **options)

    def measure(self, batch_size: int) -> None:
        """Measure the models one after another, and compare them.

        Args:
            batch_size: Packed sequences that are computed together.

        Raises:
            InputError: A model cannot be loaded, a record is bad, or two results were measured on other data.
        """
        for name in self._names:
            if name in self._stored:
                self.results += self._stored[name]
                continue
            measured = self._measured(self._subjects[name], name, batch_size, with_base=self._base is None)
            self.results += measured
            self.differences += [difference(measured[0], before) for before in measured[1:]]
        if self._url is not None:
            assert self._texts is not None
            assert self._tokenizer is not None
            self.results += passes.measure(ServedModel(self._url), self._url, self._texts.of(self._tokenizer),
                                           batch_size=batch_size)
        if self._base is not None:
            (measured_base,) = self._measured(self._base, f"{self._base_name} (base)", batch_size)
            before = replace(measured_base, is_base=True)
            self.differences.append(difference(self.results[0], before))
            self.results.append(before)
        self.differences += _with_first(self.results)

    def _measured(self, subject: Subject, name: str, batch_size: int, *, with_base: bool = False) -> list[Result]:
        """The result of a model, which is released afterwards, and with `with_base` that of an adapter's base."""
        assert self._texts is not None
        return passes.measure(LocalModel(subject, **self._loading), name, self._texts.of(subject.tokenizer),
                              batch_size=batch_size, with_base=with_base)


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
                 limit: int | None, seq_len: int | None, stride: int | None, train_on: str | None,
                 on_bad_record: str | None, **of_sources: Any) -> None:
        self._kind, self._width, self._limit = kind, width, limit
        self._made: dict[str, Material] = {}
        chosen = {"train_on": train_on, "on_bad_record": on_bad_record, "stride": stride}
        set_options: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        if data:
            self._texts: Texts = material.of_paths(data, limit=limit, **set_options, **of_sources)
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
