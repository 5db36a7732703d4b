"""Generators: who writes candidates. Here an OpenAI-compatible server, and a script; vLLM in actors is in `serving`,
what writes without a language model in `chance`.

Each has `generate(requests) -> answers per request`, `count(messages) -> tokens of the prompt`, and `stop()`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from autoprune.actors.aside import Aside
from autoprune.actors.messages import Answer, Answered, Messages, Request, chat, control, estimate, last_line
from autoprune.algorithms.manual import brief
from autoprune.models.errors import InputError, Lost

ANSWER_SEPARATOR = "\n---\n"
PATIENCE = 600.0  # seconds for which a server that went away is waited for


class Refused(Lost):
    """The server is well, and does not take this request."""


class OpenAIGenerator:
    """Speaks to an OpenAI-compatible server; sends the grammar, or the request's brief where the server refuses it."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_variable: str = "OPENAI_API_KEY",
        deadline: float = 1800.0,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """deadline: seconds for one request. report: called with a line for people when something worth knowing
        happens. Raises InputError when nobody answers at base_url or the model is not served there."""
        self._report, self._stopped = report, threading.Event()
        import openai

        self._openai = openai
        self.model = model
        self.grammar = True
        key = os.environ.get(api_key_variable) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=deadline, max_retries=0)
        try:
            served = [entry.id for entry in self._client.with_options(timeout=10, max_retries=0).models.list().data]
        except openai.APIConnectionError:
            raise InputError(f"no answer from {base_url}: start the server or mend generator.base_url") from None
        except openai.APIStatusError as error:
            raise InputError(
                f"{base_url} answered {error.status_code}: check {api_key_variable} and base_url"
            ) from None
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):  # what the client makes of a web page
            raise InputError(
                f"{base_url} answers, but is no OpenAI-compatible server: generator.base_url mostly ends in /v1"
            ) from None
        if served and model not in served:
            raise InputError(f"{base_url} does not serve {model!r}; it serves {', '.join(served[:5])}")

    def generate(self, requests: Sequence[Request], answered: Answered = lambda *_: None) -> list[list[Answer]]:
        """Answers per request; none to one that the server refuses for what it says. Raises Lost where the server
        refuses all of several, or what it would be asked instead (`control`)."""

        def ask(index: int) -> list[Answer] | Refused:
            try:
                texts = self._complete(requests[index])
            except Refused as refusal:
                return refusal
            answered(index, texts)  # before the others: whatever becomes of them, it was paid for
            return texts

        asked = [Aside(partial(ask, index)) for index in range(len(requests))]
        try:
            found = [one.wait() for one in asked]
            refused = {index: one for index, one in enumerate(found) if isinstance(one, Refused)}
            if len(refused) == len(found) > 1:
                raise refused[0]
            if len(refused) == len(found) > 0:
                self._complete(control(requests[0]))
        except BaseException:
            self._stopped.set()
            raise
        for index, refusal in refused.items():
            self._report(f"{refusal}; it goes without an answer")
            answered(index, [])
        return [[] if index in refused else texts for index, texts in enumerate(found)]

    def _complete(self, request: Request) -> list[Answer]:
        refusals = self._openai.BadRequestError, self._openai.UnprocessableEntityError
        try:
            try:
                completion = self._patiently(request, self.grammar)
            except refusals:
                completion = self._patiently(request, with_grammar=False)
                self.grammar = False  # it was the grammar: the validator alone decides from here on
        except refusals as refusal:
            raise Refused(f"{self._client.base_url} refuses the request: {last_line(refusal)}") from refusal
        except self._openai.OpenAIError as error:
            raise Lost(f"{self._client.base_url} does not answer any more: {last_line(error)}") from error
        usage = completion.usage
        # Servers count a request's tokens together; each of its answers gets an equal share of them.
        share = usage.completion_tokens // max(1, len(completion.choices)) if usage else 0
        return [
            Answer(c.message.content or "", usage.prompt_tokens if usage else 0, share, c.finish_reason or "stop")
            for c in completion.choices
        ]

    def _patiently(self, request: Request, with_grammar: bool):
        """The completion; a server that is away, or in trouble, is asked again, for PATIENCE seconds since it was first
        seen to be."""
        failed, pause = None, 1.0
        while True:
            try:
                return self._ask(request, with_grammar)
            except (
                self._openai.APIConnectionError,
                self._openai.InternalServerError,
                self._openai.RateLimitError,
            ) as error:
                failed = failed or time.monotonic()
                if time.monotonic() - failed + pause > PATIENCE:
                    raise
                self._report(f"{self._client.base_url} does not answer ({last_line(error)}): asking again")
            if self._stopped.wait(pause):
                raise Lost(f"{self._client.base_url} was not asked any more")
            pause = min(2 * pause, 30.0)

    def _ask(self, request: Request, with_grammar: bool):
        structured = {"structured_outputs": {"grammar": request.grammar}} if request.grammar and with_grammar else None
        messages = chat(request.messages)
        if not with_grammar:
            messages[0]["content"] += f"\n\n{request.brief}"
        return self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            n=request.n,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            extra_body=structured,
        )

    def count(self, messages: Messages) -> int:
        """Estimated: the server's tokenizer is not at hand. What it may be told in words beside the grammar counts."""
        return estimate((*messages, ("system", brief(True))))

    def stop(self) -> None:
        self._stopped.set()
        self._client.close()


class ScriptedGenerator:
    """Reads its answers from a file, in order, beginning again at the end. For tests and for the smoke run."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(
                f"no file {file}: generator.answers must name a text file of answers parted by '---' lines"
            )
        try:
            texts = file.read_text(encoding="utf-8").split(ANSWER_SEPARATOR)
        except UnicodeDecodeError:
            raise InputError(f"{file} is not text in UTF-8: expected answers parted by '---' lines") from None
        self._answers = [text.strip() for text in texts if text.strip()]
        if not self._answers:
            raise InputError(f"{file} holds no answers")

    def generate(self, requests: Sequence[Request], answered: Answered = lambda *_: None) -> list[list[Answer]]:
        return [[self._answer(request.offset + index) for index in range(request.n)] for request in requests]

    def _answer(self, index: int) -> Answer:
        text = self._answers[index % len(self._answers)]
        return Answer(text, completion_tokens=len(text.split()))

    count = staticmethod(estimate)

    def stop(self) -> None:
        pass
