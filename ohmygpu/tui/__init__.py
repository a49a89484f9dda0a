"""What a person types into: the terminal's own input, without commands, daemon or models."""
