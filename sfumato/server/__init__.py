"""The server: HTTP routes over a `Backend`, and the worker process that is one.

`app` puts the application together. `http/` is what every request passes; `openai/`, `anthropic/`, `ollama/`,
`systemone/` and `canvas/` are dialects: each maps its bodies to queries (`templates.requests`) and events to its
answers. `worker/` runs the model in a process of its own, `cluster/` runs several. The server's own process imports no
torch, so that it answers while the model is busy, and outlives it.
"""
