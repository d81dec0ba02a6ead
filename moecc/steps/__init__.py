"""The step of training or evaluation: what becomes of a model's graph, and what is compiled.

One module serves `compile`, `plan` and `train`, so that the step that is proved is the step that
runs.  Recipes are translated in `moecc.train.graphs`, requests in `moecc.ahead.prepare`.
"""
