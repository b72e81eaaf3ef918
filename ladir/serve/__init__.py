"""A server that speaks OpenAI's protocol, for a trained model: an optional extra (requirements-serve.txt)."""
