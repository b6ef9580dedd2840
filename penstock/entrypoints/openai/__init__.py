"""Names under which vLLM's users start servers (`python -m ...entrypoints.openai.api_server`)."""
