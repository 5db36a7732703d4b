"""How much of a candidate's time goes into scores and selection: on the demo's model, as an evaluator measures it.

    python bench/kernels/bench_share.py [--device cpu|cuda] [--dtype float32] [--windows 8] [--repeats 5]

Every algorithm prunes all blocks of SmolLM2-135M to 60% while windows of 512 tokens run through them, as on the fitness
split. Prints seconds of a pass (median), those of pruning in it, and their share.
"""

import argparse
import statistics

import torch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.scores import BASELINES
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.loading import load_config, load_tokenizer, resolve_model
from autoprune.models.shard import ModelShard

MODEL, TEXT, CONTEXT, SPARSITY = "smollm2-135m-instruct", "wikipedia-sample[40:70]", 512, 0.6
ALGORITHMS = [("wanda", "row"), ("wanda", "matrix"), ("wanda", "2:4"), ("ria", "matrix")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = resolve_model(MODEL)
    blocks = load_config(folder).num_hidden_layers
    tokens = token_windows(load_corpus(TEXT), load_tokenizer(folder), CONTEXT, options.windows)
    shard = ModelShard(folder, 0, blocks, options.dtype, options.device)
    shard.calibrate(tokens)
    shard.forward("fitness", tokens, tokens)
    print(f"{MODEL}, {options.dtype}, {options.device}, {options.windows} windows of {CONTEXT} tokens")
    for name, group in ALGORITHMS:
        algorithm, passes = Algorithm(BASELINES[name].source, group), []
        sparsity = 0.5 if group == "2:4" else SPARSITY
        sparsities = [[sparsity] * len(profile.layers) for profile in shard.profiles]
        for repeat in range(options.repeats + 1):  # the first one compiles
            _, report = shard.forward("fitness", tokens, tokens, algorithm, sparsities)
            passes += [(report.seconds, report.pruning_seconds)] if repeat else []
        seconds, pruning = (statistics.median(values) for values in zip(*passes, strict=True))
        spread = f"{min(p for _, p in passes):.2f} to {max(p for _, p in passes):.2f}"
        print(f"{name:6} {group:6}: {seconds:6.2f} s, pruning {pruning:5.2f} s ({spread}), {pruning / seconds:.1%}")


if __name__ == "__main__":
    main()
