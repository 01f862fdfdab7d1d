"""Connectors: the same records, stores and counters in inference engines of others.

    transformers   `generate` of Hugging Face models with plain keys and values
    hf_models      which of these models are accepted, and their identity
    vllm           a KV connector for vLLM
    identity       the fingerprint of a model that this package does not run itself
    shadow         whether a stored block equals the recomputed one

Nothing here is imported by the rest of the package, and an engine is imported by its own connector only.
"""
