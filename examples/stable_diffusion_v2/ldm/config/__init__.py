"""What a command asks for: the model, the options, the YAML files of ours and others, the published models."""
