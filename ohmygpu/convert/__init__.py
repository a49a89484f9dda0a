"""Compile a model: weights in, one ONNX graph with a KV cache out. No torch, no tracing."""
