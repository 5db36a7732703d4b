"""Engines that die or hang are started again, and what they had not answered is asked again; here they answer from
their options, as vLLM's actor does from its model (which `test_walk` runs)."""

import time
from dataclasses import replace

import pytest
from tiny import save_chat_model

from autoprune.actors.messages import Request
from autoprune.actors.placement import ActorResources
from autoprune.actors.serving import VllmGenerator, prompt_ids
from autoprune.models.errors import InputError, Lost
from autoprune.models.loading import load_tokenizer


def engine() -> type:
    """Within a function, so that it travels to the actors by value."""

    class Troubled:
        """Fails as often as its file has letters: d(ies), h(angs), does not w(ake up) or f(ails to start), one letter
        each time. It always dies of "boom"."""

        async def start(self, options):
            self.file, self.seed = options["file"], options["seed"]
            if self._next("f"):
                raise ValueError("no such option")

        def _next(self, *letters):
            import fcntl

            with open(self.file, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                left = file.read()
                found = left[:1] if left[:1] in letters else ""
                file.seek(0)
                file.write(left[len(found) :])
                file.truncate()
            return found

        async def sleep(self):
            pass

        async def wake_up(self):
            if self._next("w"):
                raise RuntimeError("no memory")

        async def complete(self, request):
            import asyncio
            import os

            from autoprune.actors.messages import Answer

            trouble = self._next("d", "h")
            if trouble == "d" or "boom" in str(request.messages):
                os._exit(1)
            if trouble == "h":
                await asyncio.sleep(10_000)
            return [Answer(f"{request.offset + n} by {self.seed}") for n in range(request.n)]

    return Troubled


@pytest.fixture
def make(cluster, tmp_path):
    model = save_chat_model(tmp_path / "tiny")
    made, said = [], []

    def new(troubles: str, engines: int = 1, **options) -> VllmGenerator:
        (tmp_path / "troubles").write_text(troubles)
        cpu, file = ActorResources(0, 0, "cpu"), {"file": str(tmp_path / "troubles")}
        generator = VllmGenerator(
            str(model), cpu, file, 1, (None,) * engines, report=said.append, actor=engine(), **options
        )
        made.append(generator)
        return generator

    new.said = said
    yield new
    for generator in made:
        generator.stop()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("autoprune.actors.serving.PAUSES", (0.0, 0.0, 0.0))


def requests(*offsets: int) -> list[Request]:
    return [Request((("user", "write"),), n=2, temperature=1.0, max_tokens=9, offset=offset) for offset in offsets]


def test_several_engines_share_the_prompts_and_answers_stay_in_order(make):
    generator = make("", engines=2)
    generator.wait()
    seen = {}
    answers = generator.generate(requests(0, 2, 4), seen.__setitem__)
    assert [seen[index] for index in range(3)] == answers
    assert [[a.text for a in texts] for texts in answers] == [
        ["0 by 0", "1 by 0"],
        ["2 by 1", "3 by 1"],
        ["4 by 0", "5 by 0"],
    ]
    assert generator.count((("user", "abc"),)) > 0


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}", "!<system>s<user>u"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
            "<user>s\n\nu",
        ),
        (None, "s\n\nu\n\n"),
    ],
)
def test_prompts_of_every_kind_of_template(tmp_path, template, expected):
    """A beginning of text once, where the template writes one; models without system texts, and base models."""
    tokenizer = load_tokenizer(save_chat_model(tmp_path))
    tokenizer.add_special_tokens({"bos_token": "!"})
    tokenizer.chat_template = template
    ids = prompt_ids(tokenizer, (("system", "s"), ("user", "u")))
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("trouble, word", [("d", "Actor"), ("h", "Timeout")])
def test_what_an_engine_left_unanswered_is_asked_again(make, trouble, word):
    generator = make(trouble, deadline=12.0)  # a new actor may take several seconds
    generator.wait()
    began = time.monotonic()
    (answers,) = generator.generate(requests(7))
    assert [a.text for a in answers] == ["7 by 0", "8 by 0"]
    assert len(make.said) == 1 and word in make.said[0] and "asked again" in make.said[0]
    assert time.monotonic() - began < 90


def test_an_engine_that_dies_again_and_again_ends_the_search(make, hasty):
    generator = make("dddd")
    generator.wait()
    with pytest.raises(Lost, match="vLLM stopped serving"):
        generator.generate(requests(0))
    assert len(make.said) == 3


def test_a_request_that_engines_die_of_goes_without_an_answer(make, hasty):
    """Its neighbours have theirs: after the first time it goes alone, and it is to blame since others are answered."""
    generator, seen = make(""), {}
    generator.wait()
    first, second, third = requests(0, 2, 4)
    deadly = replace(second, messages=(("user", "boom"),))
    answers = generator.generate([first, deadly, third], seen.__setitem__)
    assert [[a.text for a in texts] for texts in answers] == [["0 by 0", "1 by 0"], [], ["4 by 0", "5 by 0"]]
    assert seen == dict(enumerate(answers))
    assert len(make.said) == 4 and "goes without an answer" in make.said[-1]


def test_an_engine_that_cannot_start_again_is_given_time(make, monkeypatch):
    """As where Ray sends it to a node that is gone, until it sees that."""
    monkeypatch.setattr("autoprune.actors.serving.PAUSES", (0.0, 0.5, 1.5))
    generator = make("dfff")
    generator.wait()
    began = time.monotonic()
    with pytest.raises(Lost, match="vLLM stopped serving"):
        generator.generate(requests(0))
    assert len(make.said) == 3 and time.monotonic() - began > 2.0


def test_an_engine_that_is_lost_while_it_starts_is_started_again(make):
    import ray

    generator = make("")
    ray.kill(generator._actors[0])
    generator.wait()
    assert len(make.said) == 1
    assert [a.text for a in generator.generate(requests(7))[0]] == ["7 by 0", "8 by 0"]


@pytest.mark.parametrize("by_turns", [False, True])
def test_engines_are_waited_for_once_more_after_one_was_lost(make, by_turns):
    import ray

    generator = make("", engines=2)
    generator._by_turns = by_turns  # as on parts of one GPU
    ray.kill(generator._actors[1])
    generator._started[1] = None
    generator.wait()
    assert generator._started[0] is not None and (generator._started[1] is not None) >= by_turns
    assert len(generator.generate(requests(0, 2))) == 2


def test_an_engine_that_cannot_wake_up_is_started_again(make):
    generator = make("w")
    generator._sleeps = True
    generator.wait()
    assert [a.text for a in generator.generate(requests(7))[0]] == ["7 by 0", "8 by 0"]
    assert len(make.said) == 1


def test_an_engine_that_shares_its_gpu_is_not_left_loading(make, hasty):
    """Awake it would take the memory that evaluators count on, or they its."""
    generator = make("d", engines=2)
    generator._sleeps = generator._by_turns = True
    generator.wait()
    assert len(generator.generate(requests(0, 2))) == 2 and len(make.said) == 1
    assert not generator._loading() and None not in generator._started


def test_an_engine_that_does_not_come_up_on_a_shared_gpu_is_not_waited_for_again_and_again(make, hasty, monkeypatch):
    import ray

    monkeypatch.setattr("autoprune.actors.serving.LOADING", 2.0)
    generator = make("", engines=2)
    generator._sleeps = generator._by_turns = True
    generator.wait()

    @ray.remote(num_cpus=1000)
    class Nowhere:
        def start(self):
            pass

    def lost(number):
        generator._actors[number] = Nowhere.remote()
        generator._started[number], generator._began[number] = (
            generator._actors[number].start.remote(),
            time.monotonic(),
        )

    monkeypatch.setattr(generator, "_make", lost)
    generator._replace(1, RuntimeError("its node is gone"))
    times = []
    for _ in range(3):
        began = time.monotonic()
        assert len(generator.generate(requests(0))) == 1 and not generator._loading()
        times.append(time.monotonic() - began)
    assert times[0] >= 2.0 and max(times[1:]) < 2.0


def test_an_engine_that_cannot_come_back_leaves_the_work_to_the_others(make, hasty):
    """As where its node has died, and no other one has room."""
    generator = make("d" + "f" * 20, engines=2)
    generator.wait()
    answers = generator.generate(requests(0, 2, 4))
    assert [[a.text[:2] for a in texts] for texts in answers] == [["0 ", "1 "], ["2 ", "3 "], ["4 ", "5 "]]
    assert len({a.text[-1] for texts in generator.generate(requests(0, 2)) for a in texts}) == 1


def test_options_that_vllm_refuses_are_one_clear_line(make):
    with pytest.raises(InputError, match=r"vLLM cannot serve .*no such option.*check generator"):
        make("f").wait()
