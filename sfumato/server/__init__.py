"""The server: HTTP routes over a `Backend`, and the worker process that is one.

`app` knows HTTP and nothing of models; `worker` starts and watches the process in which `desk` runs the jobs. The
server's own process imports no torch, so that it answers while the model is busy, and outlives it.
"""
