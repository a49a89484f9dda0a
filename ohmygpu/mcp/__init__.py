"""Model Context Protocol server over the daemon."""
