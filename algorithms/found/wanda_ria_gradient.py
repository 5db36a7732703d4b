# Found by AutoPrune: smollm2-135m-instruct to 60%, mask only, float32; written by qwen2.5-coder-1.5b-instruct.
# Fitness split wikipedia-sample[40:70] (16 windows, evenly spaced), report split wikipedia-sample[70:106].
#
# The root of Wanda's score, times RIA's, times the root of the gradient, over the whole matrix; layers keep more where
# weights mean more to the loss.
#
# ppl_token@256 on the first 128 windows of the report split, float32 on a CPU, dense 21.04, as its search measured it:
# 62.81; on the same windows ria_gradient 64.40, root_wanda_plus_gradient 66.10, wanda_gradient 69.50, wanda+sdsa 82.59.
# On the whole split, 862 windows, 65.40 ± 0.96, wanda+sdsa 86.07 ± 1.34. On qwen2.5-coder-1.5b-instruct, ppl_token@512
# on 8 windows, bfloat16: 34.54 ± 4.57, wanda+sdsa 43.56 ± 4.67.
# Gradients were of the first 16 calibration windows then; today they are of 16 from all over the text.
#
# Lineage (perplexity on the fitness split, ppl_token@256):
#   seed-ria+sdsa (seed): 98.09
#   g01-c05 (mutate of seed-ria+sdsa): 81.14
#   g02-c15 (mutate of g01-c05): 74.83
#   seed-wanda+sdsa:taylor=0.5 (seed): 87.42
#   g01-c00 (tune of seed-wanda+sdsa:taylor=0.5): 80.97
#   g03-c11 (crossover of g01-c00 and g02-c15): 69.77
#   g04-c00 (tune of g03-c11): 69.52
#
# Again: python bench/search/search.py runs/strategies --arms gcot --seeds 0
# (answers are sampled, so runs differ)
# group: matrix
# allocation: sdsa depth=0.05 m=0.8375 tau=4 taylor=0.5
def score(W, x_norm, g_rms):
    v0 = W.abs()
    v1 = v0.sum(dim=0) + 1e-12
    v2 = v0.sum(dim=1, keepdim=True) + 1e-12
    v3 = v0 / v1 + v0 / v2
    v4 = v3 * x_norm.sqrt()
    v5 = W.abs() * x_norm
    v6 = g_rms.sqrt() * v4
    return v5.sqrt() * v6
