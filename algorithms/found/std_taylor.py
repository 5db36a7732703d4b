# Found by AutoPrune: smollm2-135m-instruct to 60%, mask only, float32; written by qwen2.5-coder-1.5b-instruct.
# Fitness split wikipedia-sample[40:70] (its first 8 windows, which were all that a search saw then), report split
# wikipedia-sample[70:106].
#
# It ranks as (|W|·x_std)² · (|W|·g_rms): twice what a weight adds to its output, once what its loss costs to first
# order.
#
# ppl_token@256 on the whole report split, 862 windows (autoprune compare bench/search/baselines.yaml, on a GPU): 77.74;
# wanda+sdsa 86.07, with SDSA tuned by 40 evaluations 86.13; wanda+atp 90.20; wanda 110.52. On its first 32 windows, two
# documents (KL to the dense model): 91.00 (1.377); wanda+sdsa 94.61 (1.450). On qwen2.5-coder-1.5b-instruct,
# ppl_token@512, 8 windows: 44.73 (1.026); wanda+sdsa 43.56 (1.049), wanda 68.96.
# Gradients were of the first 16 calibration windows then; today they are of 16 from all over the text.
#
# Lineage (perplexity on the fitness split, ppl_token@256):
#   seed-wanda+sdsa (seed): 61.05
#   g01-c12 (crossover of seed-wanda+sdsa, seed-pruner-zero+sdsa): 66.87
#   g02-c01 (mutate of g01-c12): 57.17, the group becomes the matrix
#   g03-c06 (explore of g02-c01): 49.81
#   g07-c10 (explore of g03-c06): 50.49, and better than it on fresh text
#
# Again: python bench/search/search.py runs/strategies --arms gcot --seeds 0 (answers are sampled, so runs differ)
# group: matrix
# allocation: sdsa depth=0.5 m=0.6 tau=1
def score(W, x_std, g_rms):
    v0 = (W.abs() * g_rms).sqrt()
    v1 = (W.abs() * x_std).sqrt()
    return v0.sqrt() * v1
