"""The parts of a model, each by the prefix of its parameters' names in Stability's single-file checkpoints."""

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PARTS = (VAE, UNET, TEXT)
