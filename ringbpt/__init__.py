"""ringbpt: LLaMA-family models on sequences far longer than one device holds."""

__version__ = "0.1.0"
