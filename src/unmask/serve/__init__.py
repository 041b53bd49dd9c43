"""The engine over HTTP: OpenAI's endpoints, metrics, and a playground."""
