"""What a language model's answers are worth under the decoding grammar, to the real prompts of a search.

    autoprune search configs/smoke.yaml --set name=answers          # whose lineage the prompts speak of
    python bench/answers.py runs/answers --model qwen2.5-coder-1.5b-instruct --answers 200

Half of the prompts ask for SDSA's parameters, half for an allocation of its own. Every answer is read and probed, here
in this process, which forgets its environment first. Prints a table, and writes every answer with what became of it to
--out, one JSON object per line.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ray

from autoprune.actors.messages import Answer, Evaluation, estimate
from autoprune.actors.placement import ActorResources
from autoprune.actors.seclusion import seclude
from autoprune.actors.serving import VllmGenerator
from autoprune.algorithms.grammar import WRITTEN_PARTS, answer_grammar
from autoprune.algorithms.probe import probe
from autoprune.algorithms.translator import LanguageError
from autoprune.models.loading import load_tokenizer, resolve_model
from autoprune.pipeline.config import ALLOCATIONS, load_config
from autoprune.pipeline.prompting import Slot
from autoprune.pipeline.search import Search

PER_PROMPT = 4
KINDS = ("usable", "cut", "constant", "not finite", "other")


def searches(folder: Path) -> list[Search]:
    """The search of a run folder as it stood at its end: once per way to write an allocation."""
    config = load_config(folder / "config.yaml")
    table = json.loads((folder / "report.json").read_text())["table"]
    dense = next(row["fitness_nll"] for row in table if row["method"] == "dense")
    evaluator = SimpleNamespace(dense={"fitness": Evaluation(dense, 1)})
    watcher = SimpleNamespace(say=lambda _: None, candidate=lambda *_: None, step=lambda *_: None)
    found = []
    for allocation in ALLOCATIONS:
        written = {name: weight for name, weight in config.search.operators.items() if name != "tune"}
        own = replace(config, search=replace(config.search, allocation=allocation, prompts=1, operators=written))
        search = Search(own, folder, SimpleNamespace(count=estimate), evaluator, watcher, watcher)
        search.restore()
        if not search.lineage.evaluated():
            raise SystemExit(f"{folder} holds no finished generation: run the search first")
        found.append(search)
    return found


def fate(search: Search, slot: Slot, answer: Answer) -> tuple[str, str | None]:
    """One of KINDS, and the refusal. An answer that was cut is that, whether or not it can be mended."""
    candidate = search.read("answer", 1, slot, answer)
    error = candidate.error
    if error is None:
        try:
            probe(candidate.algorithm, search.config.target.sparsity)
        except LanguageError as refusal:
            error = str(refusal)
    if answer.finish_reason == "length":
        return "cut", error
    if error is None:
        return "usable", None
    kinds = {"are equal": "constant", "not finite": "not finite"}
    return next((kind for text, kind in kinds.items() if text in error), "other"), error


def compile_seconds(model: str, grammar: str) -> float:
    """Seconds that xgrammar, which constrains vLLM, takes for a grammar, with the model's tokens."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(load_tokenizer(resolve_model(model)))
    compiler = xgrammar.GrammarCompiler(info, max_threads=8, cache_enabled=False)
    began = time.perf_counter()
    compiler.compile_grammar(grammar)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = searches(options.run)
    asked = []
    for index in range(max(1, options.answers // PER_PROMPT)):
        search = found[index % len(found)]
        (slot,) = search.prompter.slots(1000 + index, 0)
        asked.append((search, slot, search.prompter.request(slot, PER_PROMPT, 0, 0)))
    largest = answer_grammar(parts=WRITTEN_PARTS, statistics=found[0].config.search.statistics)
    compiling = compile_seconds(options.model, largest)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    engine = {"max_model_len": found[0].config.generator.max_model_len, "seed": 0, "enforce_eager": True}
    generator = VllmGenerator(options.model, ActorResources(1, 0, "cpu"), engine, kv_cache_gib=4)
    generator.wait()
    began = time.perf_counter()
    answers = generator.generate([request for _, _, request in asked])
    seconds = time.perf_counter() - began
    generator.stop()
    ray.shutdown()
    seclude()

    rows, tokens = [], 0
    for (search, slot, _), texts in zip(asked, answers, strict=True):
        for answer in texts:
            tokens += answer.completion_tokens
            kind, error = fate(search, slot, answer)
            row = {"operator": slot.operator, "parts": slot.parts, "kind": kind, "error": error, "text": answer.text}
            rows.append(row | {"tokens": answer.completion_tokens})
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = Counter(row["kind"] for row in rows)
    whole = len(rows) - counts["cut"]
    print(f"{options.model}: {len(rows)} answers to {len(asked)} prompts, {tokens:,} tokens, {seconds:.0f} s")
    print(f"grammar: {len(largest) / 1e3:.1f} kB, compiled in {compiling:.2f} s")
    print(", ".join(f"{kind}: {counts[kind]}" for kind in KINDS))
    print(f"of those that were not cut, usable: {counts['usable'] / max(1, whole):.1%}")
    mended = sum(row["kind"] == "cut" and row["error"] is None for row in rows)
    print(f"of those that were cut, usable after mending: {mended} of {counts['cut']}")
    for error, count in Counter(row["error"] for row in rows if row["error"]).most_common(5):
        print(f"  {count} × {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
