"""Ahead-of-time compilation for hardware that is not attached: request, worker, report.

The compiler belongs to a backend; here the graph is prepared, the plan's prediction made, and the
compilation run in a subprocess, which is killed when its time limit is exceeded.
"""
