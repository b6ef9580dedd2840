"""The Anthropic Messages API, translated to chat and back."""
