"""Export of models without a family file, by transformers, in an environment of its own."""
