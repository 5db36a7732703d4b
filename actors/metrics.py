"""What a search shows to Ray's dashboard and to Prometheus: gauges of the process that drives it."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

# Name → what it is, with its unit.
GAUGES = {
    "generation": "generation that is under way",
    "best_fitness_nats": "best mean negative log-likelihood per token on the fitness split, nats",
    "answers": "answers of the language model so far",
    "evaluations": "evaluations on the whole fitness split so far",
    "cheap_evaluations": "evaluations on less text so far",
    "in_flight": "candidates that are at a shard of the evaluators, or wait for it, by shard",
    "budget_left": "what is left of a budget that has a bound, in its unit, by budget",
    "tokens_per_second": "tokens that the language model writes per second of generating",
    "evaluations_per_hour": "evaluations, whole and cheap, per hour of evaluating",
    "evaluator_restarts": "evaluators that were made anew",
}


TAGS = {"in_flight": "shard", "budget_left": "budget"}  # what those have that hold a value for each of several


class Metrics:
    """Gauges `autoprune_…` of one run, tagged with its name. Needs a connected Ray."""

    def __init__(self, run: str) -> None:
        tags = {name: ("run", TAGS[name]) if name in TAGS else ("run",) for name in GAUGES}
        self._gauges = {name: Gauge(f"autoprune_{name}", text, tag_keys=tags[name]) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, values: Mapping[str, float | Mapping[str, float]]) -> None:
        """By name, and for those of TAGS by tag; others stay as they are."""
        for name, value in values.items():
            if name not in TAGS:
                self._gauges[name].set(value)
                continue
            for tag, one in value.items():
                self._gauges[name].set(one, tags={TAGS[name]: tag})
