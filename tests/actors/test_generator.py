"""The OpenAI-compatible client against a server on a socket that takes no grammar."""

import time

import pytest
from json_server import JsonHandler, served

from autoprune.actors.chance import GeneticGenerator, GrammarGenerator
from autoprune.actors.generator import OpenAIGenerator, ScriptedGenerator
from autoprune.actors.messages import Request
from autoprune.algorithms.answers import NOBODY, parse_answer
from autoprune.algorithms.grammar import PARTS, WRITTEN_PARTS
from autoprune.models.errors import InputError, Lost


class NoGrammar(JsonHandler):
    """Serves one model; refuses `structured_outputs` as servers do that do not know it."""

    asked: list[dict] = []

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "plain", "object": "model"}]})

    def do_POST(self):
        body = self.body()
        self.asked.append(body)
        if "structured_outputs" in body:
            return self.answer({"error": {"message": "unknown field structured_outputs"}}, 400)
        choice = {"index": 0, "message": {"role": "assistant", "content": "def score(W):"}, "finish_reason": "length"}
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        self.answer({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


@pytest.fixture
def server():
    NoGrammar.asked = []
    with served(NoGrammar) as url:
        yield url


def test_a_server_without_grammars_is_told_in_words(server):
    generator = OpenAIGenerator(server, "plain")
    request = Request((("system", "You prune."), ("user", "Write.")), 1, 0.9, 50, 'root ::= "x"', brief="Only lines.")
    seen = {}
    (answers,) = generator.generate([request], seen.__setitem__)
    assert seen == {0: answers}, "told as soon as it is there"
    assert [(a.text, a.finish_reason, a.completion_tokens) for a in answers] == [("def score(W):", "length", 4)]
    first, second = NoGrammar.asked
    assert first["structured_outputs"] == {"grammar": 'root ::= "x"'}
    assert [m["content"] for m in first["messages"]] == ["You prune.", "Write."]
    assert [m["content"] for m in second["messages"]] == ["You prune.\n\nOnly lines.", "Write."]
    generator.generate([request])  # the refusal is remembered
    assert len(NoGrammar.asked) == 3 and "structured_outputs" not in NoGrammar.asked[-1]
    generator.stop()


def test_a_web_page_is_no_server_and_bytes_are_no_answers(tmp_path):
    class Page(NoGrammar):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

    class Other(NoGrammar):
        def do_GET(self):
            self.answer({"status": "fine"})

    for handler in (Page, Other):
        with (
            served(handler) as url,
            pytest.raises(InputError, match="is no OpenAI-compatible server: generator.base_url"),
        ):
            OpenAIGenerator(url, "plain")
    (tmp_path / "answers").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="answers is not text in UTF-8"):
        ScriptedGenerator(tmp_path / "answers")


def test_a_server_in_trouble_is_asked_again_from_its_first_failure_on(monkeypatch):
    """However long the request had been under way before, and also where it refuses grammars."""
    monkeypatch.setattr("autoprune.actors.generator.PATIENCE", 2.0)
    told = []

    class Troubled(NoGrammar):
        def do_POST(self):
            if "structured_outputs" not in (body := self.body()):
                self.asked.append(body)
                if len(self.asked) == 1:
                    time.sleep(2.5)
                    return self.answer({"error": {"message": "restarting"}}, 503)
                choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
                return self.answer({"id": "1", "object": "chat.completion", "choices": [choice]})
            return self.answer({"error": {"message": "unknown field structured_outputs"}}, 400)

    Troubled.asked = []
    with served(Troubled) as url:
        generator = OpenAIGenerator(url, "plain", report=told.append)
        ((answer,),) = generator.generate([Request((("user", "Write."),), 1, 0.9, 50, 'root ::= "x"')])
        assert answer.text == "x" and len(Troubled.asked) == 2
        assert len(told) == 1 and "asking again" in told[0]
        generator.stop()


@pytest.mark.parametrize("prompts", [["bad"], ["bad", "fine"]])
def test_a_request_that_is_refused_goes_without_an_answer(prompts):
    """By a filter of texts, say; unless everything is refused."""

    class Filter(NoGrammar):
        word = "bad"

        def do_POST(self):
            body = self.body()
            if self.word in str(body["messages"]):
                return self.answer({"error": {"message": "content policy"}}, 400)
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
            self.answer({"id": "1", "object": "chat.completion", "choices": [choice]})

    seen, told = {}, []
    asked = [Request((("system", "s"), ("user", text)), 1, 0.9, 50, 'root ::= "x"') for text in prompts]
    with served(Filter) as url:
        generator = OpenAIGenerator(url, "plain", report=told.append)
        answers = generator.generate(asked, seen.__setitem__)
        assert [[a.text for a in texts] for texts in answers] == [[], ["x"]][: len(prompts)]
        assert seen == dict(enumerate(answers)) and generator.grammar
        assert len(told) == 1 and "refuses the request" in told[0] and "content policy" in told[0]
        Filter.word = ""
        with pytest.raises(Lost, match="refuses the request"):
            generator.generate(asked)


@pytest.mark.parametrize("parts", [PARTS, WRITTEN_PARTS])
def test_what_chance_writes_follows_from_the_seed_and_its_place(parts):
    def request(n, offset):
        return Request((), n, 1.0, 100, offset=offset, parts=parts, statistics=("x_norm",))

    generator = GrammarGenerator(3)
    (first,), (rest, last) = generator.generate([request(2, 0)]), generator.generate([request(5, 2), request(1, 7)])
    (whole,) = GrammarGenerator(3).generate([request(8, 0)])
    assert first + rest + last == whole and len({answer.text for answer in whole}) == 8
    assert GrammarGenerator(4).generate([request(8, 0)]) != [whole]
    for answer in whole:
        proposal = parse_answer(answer.text, parts)
        assert proposal.hypothesis == GrammarGenerator.THOUGHT
        assert bool(proposal.algorithm.allocation.source) == ("allocate" in parts)


def test_a_mutated_allocation_takes_gradients_into_account_where_there_are_some():
    (answers,) = GeneticGenerator(0).generate(
        [Request((), 40, 1.0, 100, operator="mutate", parts=("allocation",), parents=(NOBODY,), statistics=("g_rms",))]
    )
    found = [parse_answer(a.text, ("allocation",), NOBODY, ("g_rms",)).algorithm.allocation for a in answers]
    shares = [allocation.parameters.get("taylor", 0.0) for allocation in found]
    assert 0.0 in shares and sum(0.1 < share <= 0.5 for share in shares) > 10
