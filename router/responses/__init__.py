"""The OpenAI Responses API, translated to chat and back."""
