"""Serving: talking to a model in a terminal, and over HTTP as OpenAI's API has it."""
