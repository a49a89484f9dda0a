"""ohmygpu: a local AI server that compiles Hugging Face models to ONNX and serves them."""

__version__ = "0.1.0"
