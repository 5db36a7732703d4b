# Found by AutoPrune: smollm2-135m-instruct to 60%, mask only, float32; written by qwen2.5-coder-1.5b-instruct.
# Fitness split wikipedia-sample[40:70] (16 windows, evenly spaced), report split wikipedia-sample[70:106].
#
# RIA's score times the root of the gradient, over the whole matrix; layers keep more where weights mean more to the
# loss.
#
# ppl_token@256 on the first 128 windows of the report split, float32 on a CPU, dense 21.04, as its search measured it:
# 64.40; on the same windows root_wanda_plus_gradient 66.10, wanda_gradient 69.50, wanda+sdsa 82.59. On other models,
# and on the whole split, it was not measured.
# Gradients were of the first 16 calibration windows then; today they are of 16 from all over the text.
#
# Lineage (perplexity on the fitness split, ppl_token@256):
#   seed-ria+sdsa (seed): 98.09
#   g01-c00 (tune of seed-ria+sdsa): 87.24
#   g03-c05 (mutate of g01-c00): 75.48
#   g04-c00 (tune of g03-c05): 70.89
#
# Again: python bench/search/search.py runs/strategies --arms gcot --seeds 1
# (answers are sampled, so runs differ)
# group: matrix
# allocation: sdsa depth=0.275 m=0.7125 tau=4 taylor=0.5
def score(W, x_norm, g_rms):
    v0 = W.abs()
    v1 = v0.sum(dim=0) + 1e-12
    v2 = v0.sum(dim=1, keepdim=True) + 1e-12
    v3 = v0 / v1 + v0 / v2
    v4 = v3 * x_norm.sqrt()
    return g_rms.sqrt() * v4
