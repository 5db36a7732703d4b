"""The lineage page as text: what is escaped, cut and left out, and that its data say what the lineage says."""

import base64
import hashlib
import json
import math
import re

import pytest
from lineages import made_up

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.lineage import STATUSES, Candidate, Lineage
from autoprune.pipeline.lineage_page import LONGEST, cut, lineage_html, page_data, visible


@pytest.fixture(scope="module")
def search():
    return made_up(20, 30, seed=2)


def data_of(page):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def alone(**fields):
    lineage = Lineage()
    lineage.add(Candidate("seed-wanda", 0, "seed", (), **fields))
    return lineage


def test_the_data_say_what_the_lineage_says(search):
    lineage, best = search
    data = data_of(lineage_html(lineage, best, "demo", dense=2.5))
    candidates, texts = data["candidates"], data["texts"]
    assert [c["id"] for c in candidates] == [c.id for c in lineage]
    assert candidates[data["best"]]["id"] == best and data["dense"] == 2.5
    assert {c["status"] for c in candidates} == set(STATUSES)
    assert len(set(texts)) == len(texts)
    for shown, candidate in zip(candidates, lineage, strict=True):
        parents = [candidates[place]["id"] for place in shown.get("parents", [])]
        assert parents == list(candidate.parents)
        for parent, against in zip(parents, shown.get("against", []), strict=True):
            edge = lineage.edge(parent, candidate.id)
            assert against["verdict"] == edge["verdict"]
            if math.isfinite(edge.get("effect", math.nan)):
                assert against["effect"] == pytest.approx(edge["effect"], rel=1e-4)
        if candidate.algorithm:
            assert texts[shown["score"]] == candidate.algorithm.score
        if candidate.repeats:
            assert candidates[shown["repeats"]]["id"] == candidate.repeats
        if math.isfinite(candidate.fitness):
            assert shown["nll"] == pytest.approx(candidate.fitness, rel=1e-5)
            assert shown["errors"] == pytest.approx(candidate.evaluation.block_errors, rel=1e-3)


def test_prompts_and_answers_that_could_be_read_are_left_out(search):
    lineage, best = search
    page = lineage_html(lineage, best, "demo")
    assert "p" * 100 not in page
    answered = {c["status"] for c in data_of(page)["candidates"] if "answer" in c}
    assert answered == {"invalid"}


def test_two_thousand_candidates_fit():
    lineage, best = made_up(57, 35)
    assert len(lineage) == 2000 and len(lineage_html(lineage, best, "long").encode()) < 10e6


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb⟨U+000D⟩c"),
        ("\u202ereversed\u202c", "⟨U+202E⟩reversed⟨U+202C⟩"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("\x00\x1b[31m\x7f\x9b", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+009B⟩"),
        ("\ud800 alone", "⟨U+D800⟩ alone"),
        ("lines\u2028and\u2029paragraphs", "lines⟨U+2028⟩and⟨U+2029⟩paragraphs"),
        ("γ_b = E[(|w|−μ)³]/σ³ 剪枝 🙂", "γ_b = E[(|w|−μ)³]/σ³ 剪枝 🙂"),
    ],
)
def test_what_would_hide_or_reorder_text_is_spelled_out(text, shown):
    assert visible(text) == shown


def test_long_texts_are_cut_and_say_so():
    assert cut("x" * LONGEST) == "x" * LONGEST
    assert cut("x" * (LONGEST + 1234)) == "x" * LONGEST + "… (1,234 more characters in lineage.json)"


def test_no_text_can_leave_its_place():
    words = "</script><!--<script>&amp;\u2028\ud800 {{title}}{{script}}"
    algorithm = Algorithm(words, words, Allocation(words, source=words))
    lineage = alone(algorithm=algorithm, diagnosis=words, hypothesis=words, error=words, salvaged=(words,))
    page = lineage_html(lineage, "seed-wanda", f"{words}\u202e")
    assert page.encode().decode() == page, "no lone surrogate is left"
    assert page.count("<script") == page.count("</script>") == 2 and page.count("<title>") == 1
    assert "&lt;/script&gt;&lt;!--&lt;script&gt;&amp;amp;⟨U+2028⟩⟨U+D800⟩ {{title}}{{script}}⟨U+202E⟩" in page
    data = data_of(page)
    assert set(data["texts"]) == {visible(words)}


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(search):
    page = lineage_html(*search, "demo")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    script = page.rpartition("<script>")[2]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "Function(", "document.write", "fetch("):
        assert word not in script, word
    for word in ("localStorage", "sessionStorage", "cookie", "window.parent", "alert(", "window.open", "http:"):
        assert word not in script.replace("http://www.w3.org/2000/svg", ""), word
    assert not re.search(r"\b(src|href)=", page.partition('id="data"')[0])


def test_numbers_that_are_none_become_null():
    measured = Evaluation(math.inf, 511, (math.inf, math.nan), (0.5, math.nan), (math.inf, 0.1), math.nan)
    lineage = alone(status="evaluated", evaluation=measured, fresh=measured, rungs={"probe": math.nan, "cheap": 4.2})
    shown = data_of(lineage_html(lineage, "seed-wanda", "", dense=math.inf))
    assert shown["dense"] is None
    (candidate,) = shown["candidates"]
    assert not {"nll", "nll_error", "sparsity", "fresh"} & set(candidate)
    assert candidate["sparsities"] == [0.5, None] and candidate["errors"] == [None, 0.1]
    assert candidate["rungs"] == {"probe": None, "cheap": 4.2}


def test_a_candidate_without_anything_and_a_best_that_is_not_there():
    lineage = alone()
    (candidate,) = page_data(lineage, "seed-wanda", "")["candidates"]
    assert candidate["status"] == "proposed" and not {"nll", "score", "against", "error"} & set(candidate)
    with pytest.raises(KeyError):
        page_data(lineage, "another", "")


def test_a_lineage_that_was_read_back_makes_the_same_page(search):
    lineage, best = search
    again = Lineage.from_dict(json.loads(json.dumps(lineage.to_dict())))
    assert lineage_html(again, best, "demo") == lineage_html(lineage, best, "demo")
