# Found by AutoPrune: smollm2-135m-instruct to 60%, mask only, float32; written by qwen2.5-coder-1.5b-instruct.
# Fitness split wikipedia-sample[40:70] (8 windows, evenly spaced), report split wikipedia-sample[70:106].
#
# It ranks as |W|·x_norm·g_rms^½, over the whole matrix, and layers keep more where weights mean more to the loss.
#
# ppl_token@256 on 128 windows evenly spaced over the report split, float32 on a CPU: 71.84; wanda+sdsa 84.73,
# std_taylor 76.62; Wanda's score with the allocation that a search found before, sdsa depth=0 m=0.6 tau=4 taylor=0.5,
# 74.36. Of the whole report split, on a GPU, the last has 75.30, and Wanda with SDSA and taylor tuned by 40 evaluations
# 75.05: about 3% of the 15% is the score. On other models it was not measured.
# Gradients were of the first 16 calibration windows then; today they are of 16 from all over the text.
#
# Lineage (perplexity on the fitness split, ppl_token@256):
#   seed-ria+sdsa (seed): 98.68
#   g04-c15 (crossover of seed-ria+sdsa, g03-c03): 85.22
#   g05-c00 (tune of g04-c15): 81.24
#   g06-c17 (mutate of g05-c00): 79.65
#   g07-c12 (mutate of g06-c17): 78.43
#   g08-c14 (mutate of g07-c12): 77.55
#   g09-c00 (tune of g08-c14): 77.86, and better than it on fresh text
#
# Again: python bench/search/search.py runs/strategies --arms gcot --seeds 0 --set data.fitness_windows=8
# (answers are sampled, so runs differ)
# group: matrix
# allocation: sdsa depth=0.4 m=0.4625 tau=4 taylor=0.75
def score(W, x_norm, g_rms):
    v0 = W.abs() * x_norm
    return g_rms.sqrt() * v0
