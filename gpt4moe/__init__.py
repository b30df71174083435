"""gpt4moe: train, evaluate, serve and cost GPT-4-style mixture-of-experts transformers in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # `import gpt4moe` must stay free of JAX, so that `gpt4moe --help` answers at once.
    if name == "load":
        from gpt4moe.launch import load

        return load
    raise AttributeError(f"module 'gpt4moe' has no attribute {name!r}")
