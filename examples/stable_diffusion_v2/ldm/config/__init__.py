"""The config of a model, the options of a command, the YAML files of ours and others, the published models."""
