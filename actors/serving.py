"""vLLM in Ray actors: one or several engines, which are made anew when they die."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Sequence

from autoprune.actors.dispatch import BLAMELESS, PAUSES, TRIES
from autoprune.actors.guard import guard_session
from autoprune.actors.messages import Answer, Answered, Messages, Request, chat, control, last_line
from autoprune.actors.replica import blameless
from autoprune.models.errors import InputError, Lost
from autoprune.models.loading import load_tokenizer, resolve_model
from autoprune.models.pruning import native_dtype

DEATHS = 3  # so often may a request lose its engine
LOADING = 300.0  # seconds for which evaluators wait, after what was to be written, for an engine on their GPU to start


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Tokens of a conversation up to where the answer begins. As tokens, since vLLM would put a second beginning of
    text before the one of a template.

    A template that takes no system text has it before the user's first; a base model, which has no template, is given
    the texts, and continues them.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return tokenizer("".join(f"{text}\n\n" for _, text in messages)).input_ids
    settings = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(chat(messages), **settings)
    except TemplateError:
        if messages[0][0] != "system":
            raise
        (_, instructions), (role, first), *others = messages
        joined = ((role, f"{instructions}\n\n{first}"), *others)
        text = tokenizer.apply_chat_template(chat(joined), **settings)
    return tokenizer(text, add_special_tokens=False).input_ids


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
        if options.get("enable_sleep_mode"):
            await self.sleep()  # until it is to write: evaluators have its memory

    async def complete(self, request: Request) -> list[Answer]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        prompt = {"prompt_token_ids": prompt_ids(self.tokenizer, request.messages)}
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

    async def sleep(self) -> None:
        """Free the accelerator: weights go to the CPU's memory, the cache goes."""
        await self.engine.sleep(level=1)

    async def wake_up(self) -> None:
        await self.engine.wake_up()


def _next(answers: Collection[int], lost: Sequence[float]) -> list[int]:
    """Places of the requests to send now. One that its engine died with goes after the others and alone, since its
    neighbours would be suspected with it."""
    left = [index for index in range(len(lost)) if index not in answers]
    return [index for index in left if lost[index] < 1] or left[:1]


class VllmGenerator:
    """Driver side of the engines. Requests go to them by turns; what an engine that died left unanswered is sent again.

    With `sleeps`, engines are awake only while they write, so that evaluators can have the same GPU.
    """

    def __init__(
        self,
        model: str,
        resources,
        options: dict,
        kv_cache_gib: int,
        places: Sequence = (None,),
        sleeps: bool = False,
        deadline: float = 1800.0,
        report: Callable[[str], None] = lambda _: None,
        actor: type = VllmEngine,
    ) -> None:
        """model: a name that every node can resolve. resources: ActorResources of each engine. options: further
        AsyncEngineArgs. places: where each engine runs (`Neighbours`, or None for anywhere). deadline: seconds that
        the requests of one call of `generate` may take, then whoever has not answered counts as dead. report: called
        with a line for people when something worth knowing happens. actor: the class of the actors, VllmEngine or one
        that does as it does."""
        self._class, self._stopped, self._deadline = actor, False, deadline
        self.model, self._resources, self._options = model, resources, options
        self._places, self._sleeps, self._report = list(places), sleeps and resources.device != "cpu", report
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CONFIGURE_LOGGING": "1", "TQDM_DISABLE": "1"}
        if resources.device == "cpu":
            environment |= {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
        else:
            # FlashInfer's kernels are compiled by CUDA's toolkit where they are first called, which no lock of ours
            # brings; vLLM's and PyTorch's own are there.
            environment |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
            self._options = {
                "gpu_memory_utilization": round(0.9 * min(1.0, resources.num_gpus), 2),
                "tensor_parallel_size": max(1, int(resources.num_gpus)),
                "enable_sleep_mode": self._sleeps,
                # vLLM's other way, Ray, would want a GPU in each bundle of the actor's place.
                "distributed_executor_backend": "mp",
            } | options
        self._environment = environment
        self._tokenizer = load_tokenizer(resolve_model(model))
        self._deaths = [0] * len(self._places)  # since the last answer
        self._began = [0.0] * len(self._places)  # when the engine was made
        self._actors, self._started = [None] * len(self._places), [None] * len(self._places)
        # vLLM takes whatever of a GPU is used while it loads for its own: those that share one start by turns.
        self._by_turns = 0 < resources.num_gpus < 1
        for number in range(1 if self._by_turns else len(self._places)):
            self._make(number)

    def _make(self, number: int) -> None:
        import ray

        self._began[number] = time.monotonic()
        resources, place = self._resources, self._places[number]
        actor = (
            ray.remote(self._class)
            .options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                runtime_env={"env_vars": self._environment},
                **({"scheduling_strategy": place.strategy(0)} if place else {}),
            )
            .remote()
        )
        seed = self._options.get("seed", 0) + number  # or all engines would write the same
        self._actors[number] = actor
        self._started[number] = actor.start.remote({"model": self.model, **self._options, "seed": seed})

    def wait(self) -> None:
        """Block until an engine serves. Raises InputError when one cannot serve the model with these options."""
        import ray

        for number in range(len(self._started)):
            try:
                if self._started[number] is None and self._by_turns:
                    self._make(number)
                if self._started[number] is not None:
                    ray.get(self._started[number], timeout=self._deadline)
            except ray.exceptions.RayTaskError as error:
                raise InputError(f"vLLM cannot serve {self.model} ({last_line(error)}): check generator.*") from error
            except ray.exceptions.RayError:
                continue  # it is gone, or late: `_serving` has it made anew
        self._serving()

    def generate(self, requests: Sequence[Request], answered: Answered = lambda *_: None) -> list[list[Answer]]:
        """Answers per request; none, if engines died DEATHS times with it and then answered it in other words
        (`control`). Raises Lost when every engine died TRIES times without an answer between, or engines died DEATHS
        times with those, too."""
        import ray

        answers: dict[int, list[Answer]] = {}
        lost = [0.0] * len(requests)
        blamed: int | None = None  # who is asked in other words
        while len(answers) < len(requests):
            dead: dict[int, Exception] = {}
            serving = self._serving()
            asleep = self._call("wake_up", serving)
            for number, error in asleep.items():
                self._replace(number, error)
            serving = [number for number in serving if number not in asleep]
            if not serving:
                continue
            began = time.monotonic()
            sent = (
                {i: requests[i] for i in _next(answers, lost)}
                if blamed is None
                else {blamed: control(requests[blamed])}
            )
            calls = [
                (index, number, self._actors[number].complete.remote(request))
                for (index, request), number in zip(sent.items(), itertools.cycle(serving), strict=False)
            ]
            for index, number, call in calls:
                try:
                    texts = ray.get(call, timeout=max(0.0, began + self._deadline - time.monotonic()))
                except ray.exceptions.RayError as error:
                    dead[number] = error
                    lost[index] += BLAMELESS if blameless(error) else 1
                    if lost[index] >= DEATHS:
                        blamed = index
                    continue
                self._deaths[number] = 0
                if index == blamed:
                    self._report(f"vLLM ended {DEATHS} times with the same request, which goes without an answer")
                    texts, blamed = [], None
                answers[index] = texts
                answered(index, texts)
            for number, error in dead.items():
                self._replace(number, error, max(lost) >= 2 * DEATHS)
        for number, error in self._call("sleep", self._settled()).items():
            self._replace(number, error)  # awake, it would have the memory that evaluators count on
        return [answers[index] for index in range(len(requests))]

    def _settled(self) -> list[int]:
        """Engines that serve, once no other one is loading where they share GPUs: it would take the memory that
        evaluators count on, or they its. One that is long about it, or was before, ends."""
        import ray

        serving, end = self._serving(), time.monotonic() + LOADING
        if self._sleeps and self._by_turns:
            while time.monotonic() < end and any(self._deaths[number] < 2 for number in self._loading()):
                time.sleep(0.1)
                serving = self._serving()
            for number in self._loading():
                self._replace(number, ray.exceptions.GetTimeoutError("still loading when others need its GPU"))
        return serving

    def _serving(self) -> list[int]:
        """Engines that have started, at least one: waits for it. Those that could not start are made anew."""
        import ray

        while True:
            serving = []
            for number, started in enumerate(self._started):
                age = time.monotonic() - self._began[number]
                try:
                    if started is None:
                        # Often in a row: not at once again; and not beside another one, where they share a GPU.
                        rest = self._by_turns and self._loading()
                        if not rest and age >= PAUSES[min(self._deaths[number], len(PAUSES)) - 1]:
                            self._make(number)
                    elif ray.wait([started], timeout=0)[0]:
                        ray.get(started)
                        serving.append(number)
                    elif age > self._deadline:
                        raise ray.exceptions.GetTimeoutError(f"not started within {self._deadline:g} s")
                except ray.exceptions.RayError as error:
                    self._replace(number, error)
            if serving:
                return serving
            starting = [started for started in self._started if started is not None]
            if starting:
                ray.wait(starting, timeout=min(self._deadline, 1.0))
            else:
                time.sleep(0.1)

    def _loading(self) -> list[int]:
        """Engines that are starting."""
        import ray

        started = {one: number for number, one in enumerate(self._started) if one is not None}
        return (
            [started[one] for one in ray.wait(list(started), num_returns=len(started), timeout=0)[1]] if started else []
        )

    def _call(self, method: str, numbers: Sequence[int]) -> dict[int, Exception]:
        """Of these engines, if they take turns. Returns those that failed."""
        import ray

        failed: dict[int, Exception] = {}
        if self._sleeps:
            for number, call in [(n, getattr(self._actors[n], method).remote()) for n in numbers]:
                try:
                    ray.get(call, timeout=self._deadline)
                except ray.exceptions.RayError as error:
                    failed[number] = error
        return failed

    def _replace(self, number: int, error: Exception, hopeless: bool = False) -> None:
        """End an engine; `_serving` has it made anew. hopeless: it would be in vain."""
        import ray

        if self._stopped:
            raise Lost(f"vLLM was stopped while it served {self.model}") from error
        self._deaths[number] += 1
        if hopeless or min(self._deaths) >= TRIES:
            raise Lost(f"vLLM stopped serving {self.model} ({last_line(error)})") from error
        self._report(f"vLLM is started again ({last_line(error)}); what it had not answered is asked again")
        ray.kill(self._actors[number])
        self._started[number] = None

    def count(self, messages: Messages) -> int:
        return len(prompt_ids(self._tokenizer, messages))

    def stop(self) -> None:
        """End the actors; their guards end the engines' processes."""
        import ray

        self._stopped = True
        for actor in filter(None, self._actors):
            ray.kill(actor)
