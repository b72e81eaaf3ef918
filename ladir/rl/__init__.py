"""Stage 3: what reinforcement learning computes, of groups of judged answers and of one packed pass of the denoiser."""
