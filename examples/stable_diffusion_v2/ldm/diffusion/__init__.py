"""The mathematics of diffusion: what the network predicts, the noise schedule, the loss and the samplers."""
