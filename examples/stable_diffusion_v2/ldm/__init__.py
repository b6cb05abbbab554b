"""Latent diffusion in MindSpore: networks, diffusion mathematics, data, training and checkpoints."""
