"""Nouns, settings, storage and downloads. Imports nothing of ohmygpu outside this package."""
