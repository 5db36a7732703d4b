# Found by AutoPrune: smollm2-135m-instruct to 60%, mask only, float32; written by qwen2.5-coder-1.5b-instruct.
# Fitness split wikipedia-sample[40:70] (16 windows, evenly spaced), report split wikipedia-sample[70:106].
#
# It ranks as (|W|·x_norm)^½ + |W|·g_rms, over the whole matrix, and layers keep more where weights mean more to the
# loss.
#
# ppl_token@256 on the first 128 windows of the report split, float32 on a CPU, dense 21.04: 66.10 (KL to the dense
# model 1.270); wanda+sdsa 82.59 (1.508), wanda_gradient 69.50 (1.324). On other models it was not measured.
# Gradients were of the first 16 calibration windows then; today they are of 16 from all over the text.
#
# Lineage (perplexity on the fitness split, ppl_token@256):
#   seed-wanda+sdsa (seed): 93.07
#   g01-c16 (mutate of seed-wanda+sdsa, its allocation): 86.57
#   g02-c00 (crossover of g01-c16, g01-c09): 76.03
#   g04-c14 (mutate of g02-c00, its allocation): 75.44
#   g06-c02 (mutate of g04-c14): 73.22
#   g09-c00 (tune of g06-c02): 72.90
#
# Again: python bench/search/search.py runs/strategies --arms gcot --seeds 0
# (answers are sampled, so runs differ)
# group: matrix
# allocation: sdsa depth=0.175 m=0.6 tau=1.5 taylor=0.5
def score(W, x_norm, g_rms):
    v0 = W.abs() * x_norm
    v1 = W.abs() * g_rms
    return v0.sqrt() + v1
