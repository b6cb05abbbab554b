"""Training: gradients, optimizers, EMA, learning rate, inputs of a step, the log, and the state that a resume needs."""
