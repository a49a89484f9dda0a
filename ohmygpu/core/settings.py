"""Settings: defaults < config.toml < environment < flags. Read once, failing loudly."""
