"""Part of ohmygpu."""
