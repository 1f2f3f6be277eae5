"""What work costs and what a machine can do: counted, and measured. `cli` and benchmarks/ print it.

Needs torch alone: benchmarks run where neither typer nor rich is installed.
"""
