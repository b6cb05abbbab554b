"""The networks of Stable Diffusion; their parameters are named as in Stability's single-file checkpoints."""
