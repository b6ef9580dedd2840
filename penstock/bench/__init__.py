"""`penstock bench`: offline benchmarks with vLLM's flags and result keys. `command.run` is where it starts."""
