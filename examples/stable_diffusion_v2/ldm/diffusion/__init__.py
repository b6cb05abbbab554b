"""The mathematics of diffusion: prediction types, noise schedules, the loss and the samplers."""
