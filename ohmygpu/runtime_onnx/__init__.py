"""The ONNX Runtime implementation of the Runtime protocol: one engine for each loaded model."""
