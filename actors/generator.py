"""Generators: who writes candidates. vLLM inside a Ray actor, an OpenAI-compatible server, chance, or a script.

Each has `generate(requests) -> answers per request`, `count(messages) -> tokens of the prompt`, and `stop()`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autoprune.actors.guard import guard_session
from autoprune.actors.messages import Answer, Messages, Request, last_line
from autoprune.algorithms.algorithm import GROUPS, Allocation
from autoprune.algorithms.answers import SDSA, sdsa_bounds
from autoprune.algorithms.derivation import derive
from autoprune.algorithms.grammar import answer_rules
from autoprune.algorithms.language import parse
from autoprune.algorithms.manual import brief
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.variation import NoVariationError, crossed, mutated, part_rules
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.models.errors import InputError, Lost
from autoprune.models.loading import load_tokenizer, resolve_model
from autoprune.models.pruning import native_dtype

ANSWER_SEPARATOR = "\n---\n"
CHARACTERS = 2.5  # that a token of code has, at least, where no tokenizer is at hand


def estimate(messages: Messages) -> int:
    """Tokens of a prompt whose tokenizer is not known; rather too many."""
    return int(sum(len(text) for _, text in messages) / CHARACTERS)


def _chat(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


class VllmEngine:
    """The body of the Ray actor: one vLLM `AsyncLLM`. The engine is seeded, not the requests: a seed per request
    together with chunked prefill kills vLLM's CPU engine, and the search's journal makes runs reproducible anyway."""

    async def start(self, options: dict) -> None:
        """Load the model. options: keyword arguments of vLLM's AsyncEngineArgs; a bundled model name is resolved."""
        # Ray sets one thread for an actor that reserves no CPU; vLLM would bind itself to all cores but one.
        os.environ |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        import torch

        if not torch.cuda.is_available():
            # vLLM serves a bfloat16 model in bfloat16, which a processor without instructions for it emulates, at a
            # fraction of the speed of float32.
            options = {"dtype": native_dtype("auto")} | options
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.guard = guard_session()
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**options | {"model": str(resolve_model(options["model"]))})
        )
        self.tokenizer = self.engine.get_tokenizer()
        self.served = 0

    async def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        import asyncio

        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def _complete(self, request: Request) -> list[Answer]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        prompt = self.tokenizer.apply_chat_template(_chat(request.messages), tokenize=False, add_generation_prompt=True)
        parameters = SamplingParams(
            n=request.n,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(grammar=request.grammar) if request.grammar else None,
        )
        self.served += 1
        async for output in self.engine.generate(prompt, parameters, request_id=f"request-{self.served}"):
            final = output
        return [
            Answer(o.text, len(final.prompt_token_ids), len(o.token_ids), o.finish_reason or "stop")
            for o in sorted(final.outputs, key=lambda o: o.index)
        ]


class VllmGenerator:
    """Driver side of the vLLM actor."""

    def __init__(self, model: str, resources, options: dict, kv_cache_gib: int) -> None:
        """model: a name that every node can resolve. resources: ActorResources. options: further AsyncEngineArgs."""
        import ray

        self.model = model
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CONFIGURE_LOGGING": "1", "TQDM_DISABLE": "1"}
        if resources.device == "cpu":
            environment |= {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
        else:
            options = options | {"gpu_memory_utilization": round(0.9 * min(1.0, resources.num_gpus), 2)}
        actor = ray.remote(VllmEngine).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, runtime_env={"env_vars": environment}
        )
        self._tokenizer = load_tokenizer(resolve_model(model))
        self._actor = actor.remote()
        self._started = self._actor.start.remote({"model": model, **options})

    def wait(self) -> None:
        """Block until the engine serves. Raises InputError when it cannot serve the model with these options."""
        import ray

        try:
            ray.get(self._started)
        except ray.exceptions.RayError as error:
            raise InputError(f"vLLM cannot serve {self.model} ({last_line(error)}): check generator.*") from error

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Answers per request. Raises Lost when the engine died."""
        import ray

        try:
            return ray.get(self._actor.generate.remote(list(requests)))
        except ray.exceptions.RayError as error:
            raise Lost(f"vLLM stopped serving {self.model} ({last_line(error)})") from error

    def count(self, messages: Messages) -> int:
        text = self._tokenizer.apply_chat_template(_chat(messages), tokenize=False, add_generation_prompt=True)
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def stop(self) -> None:
        """End the actor; its guard ends the engine's processes."""
        import ray

        ray.kill(self._actor)


class OpenAIGenerator:
    """Speaks to an OpenAI-compatible server; sends the grammar, or the request's brief where the server refuses it."""

    def __init__(
        self, base_url: str, model: str, api_key_variable: str = "OPENAI_API_KEY", timeout: float = 600
    ) -> None:
        """Raises InputError when nobody answers at base_url or the model is not served there."""
        import openai

        self._openai = openai
        self.model = model
        self.grammar = True
        key = os.environ.get(api_key_variable) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=2)
        try:
            served = [entry.id for entry in self._client.with_options(timeout=10, max_retries=0).models.list()]
        except openai.APIConnectionError:
            raise InputError(f"no answer from {base_url}: start the server or mend generator.base_url") from None
        except openai.APIStatusError as error:
            raise InputError(
                f"{base_url} answered {error.status_code}: check {api_key_variable} and base_url"
            ) from None
        if served and model not in served:
            raise InputError(f"{base_url} does not serve {model!r}; it serves {', '.join(served[:5])}")

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        with ThreadPoolExecutor(max_workers=len(requests)) as threads:
            return list(threads.map(self._complete, requests))

    def _complete(self, request: Request) -> list[Answer]:
        try:
            completion = self._ask(request, with_grammar=self.grammar)
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as refusal:
            try:
                completion = self._ask(request, with_grammar=False)
            except self._openai.APIStatusError:
                raise Lost(f"{self._client.base_url} refuses the request: {last_line(refusal)}") from refusal
            self.grammar = False  # it was the grammar: the validator alone decides from here on
        except self._openai.OpenAIError as error:
            raise Lost(f"{self._client.base_url} does not answer any more: {last_line(error)}") from error
        usage = completion.usage
        # Servers count a request's tokens together; each of its answers gets an equal share of them.
        share = usage.completion_tokens // max(1, len(completion.choices)) if usage else 0
        return [
            Answer(c.message.content or "", usage.prompt_tokens if usage else 0, share, c.finish_reason or "stop")
            for c in completion.choices
        ]

    def _ask(self, request: Request, with_grammar: bool):
        structured = {"structured_outputs": {"grammar": request.grammar}} if request.grammar and with_grammar else None
        messages = _chat(request.messages)
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
        self._client.close()


class GrammarGenerator:
    """Draws its answers from the grammar at random, whatever the prompt says: what a language model has to beat.

    The n-th answer of a search follows from the seed and n alone.
    """

    THOUGHT = "drawn from the grammar at random"
    count = staticmethod(estimate)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        return [
            [
                self._answer(request, random.Random(f"{self._seed}/answer {request.offset + i}"))
                for i in range(request.n)
            ]
            for request in requests
        ]

    def _answer(self, request: Request, source: random.Random) -> Answer:
        rules = answer_rules(parts=request.parts, statistics=request.statistics)
        return Answer(derive(rules, source, lambda _: self.THOUGHT))

    def stop(self) -> None:
        pass


class GeneticGenerator(GrammarGenerator):
    """Varies the parents of a request by the moves of genetic programming (`algorithms.variation`): the search without
    a language model. `explore` draws from the grammar instead; `simplify` puts one of its own parts in a part's place.

    The n-th answer of a search follows from the seed, n and the parents.
    """

    THOUGHT = "varied at random"
    TRIES = 20  # until a variation is in the language
    REGROUPED = 0.25  # share of mutated scores whose group is drawn anew
    SPREADS = {"tau": (0.5, 2.0), "m": (0.7, 1.4), "depth": (0.6, 1.6), "taylor": (0.5, 2.0)}  # of a mutated allocation
    LEAST = {"taylor": 0.25}  # that is spread, else 0.05: from 0 nothing would come

    def _answer(self, request: Request, source: random.Random) -> Answer:
        if request.operator == "explore" or not request.parents:
            return super()._answer(request, source)
        lines = [f"Diagnosis: {self.THOUGHT}", f"Hypothesis: {self.THOUGHT}"]
        if "group" in request.parts:
            group = source.choice(request.parents).group
            if request.operator != "crossover" and source.random() < self.REGROUPED:
                group = source.choice(GROUPS)
            lines.append(f"Group: {group}")
        if "allocation" in request.parts:
            lines.append(f"Allocation: {self._allocation(request, source)}")
        for name in ("allocate", "score"):
            if name in request.parts:
                lines.append(self._varied(name, request, source).strip())
        return Answer("\n".join(lines))

    def _allocation(self, request: Request, source: random.Random) -> str:
        """SDSA's parameters, each from either parent and, but for crossover, about half of them moved. Of a parent with
        another rule the default's count."""
        own = [a.allocation if a.allocation.name == SDSA.name else SDSA for a in request.parents]
        settings = []
        for key, (low, high) in sdsa_bounds(request.statistics).items():
            value = source.choice(own).parameters.get(key, 0.0)
            if request.operator != "crossover" and source.random() < 0.5:
                value = max(value, self.LEAST.get(key, 0.05)) * source.uniform(*self.SPREADS[key])
            settings.append(f"{key}={min(max(value, low), high):.3f}")
        return f"sdsa {' '.join(settings)}"

    def _varied(self, name: str, request: Request, source: random.Random) -> str:
        """A varied function; the first parent's, where nothing comes of TRIES tries."""
        rules = part_rules(request.statistics)
        texts = [a.score if name == "score" else _allocate(a.allocation) for a in request.parents]
        for _ in range(self.TRIES):
            try:
                if request.operator == "crossover":
                    text = crossed(texts[0], texts[-1], name, source)
                else:
                    text = mutated(texts[0], name, source, rules, simpler=request.operator == "simplify")
            except (LanguageError, NoVariationError):
                continue
            if name == "allocate" or set(parse(text).reads) <= set(request.statistics):
                return text
        return texts[0]


def _allocate(allocation: Allocation) -> str:
    """An allocation as a function: its own, or what does as its rule does, or the uniform one."""
    return allocation.source or WRITTEN_ALLOCATIONS.get(allocation.name, WRITTEN_ALLOCATIONS["uniform"])


BY_CHANCE = {"grammar": GrammarGenerator, "genetic": GeneticGenerator}  # by kind: made from a seed alone


class ScriptedGenerator:
    """Reads its answers from a file, in order, beginning again at the end. For tests and for the smoke run."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(
                f"no file {file}: generator.answers must name a text file of answers parted by '---' lines"
            )
        self._answers = [text.strip() for text in file.read_text().split(ANSWER_SEPARATOR) if text.strip()]
        if not self._answers:
            raise InputError(f"{file} holds no answers")

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        return [[self._answer(request.offset + index) for index in range(request.n)] for request in requests]

    def _answer(self, index: int) -> Answer:
        text = self._answers[index % len(self._answers)]
        return Answer(text, completion_tokens=len(text.split()))

    count = staticmethod(estimate)

    def stop(self) -> None:
        pass
