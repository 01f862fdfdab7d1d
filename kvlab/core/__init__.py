"""Block keys (`keys`), records (`record`, `precisions`, `codecs`, `seals`) and eviction policies (`policies`)."""
