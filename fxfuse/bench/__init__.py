"""`fxfuse bench` and `fxfuse demo`: what a fusion gains, measured side by side with its rivals.

One job a file: `workloads` (the models and their sizes), `rivals` (who is compared), `timing`, `memory`, `accuracy`
and `limits` (the four things measured), `cases` (what to measure, from the options), `measure` (one case),
`run` (the loop over the cases and the JSON), `terminal`, `tables` and `plot` (what a person reads), `demo`.
"""
