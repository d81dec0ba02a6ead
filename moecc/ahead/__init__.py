"""Compiling a model for a machine that is not there: what is asked, where it runs, what is told.

The compiler is a backend's; here the graph is prepared, the plan's prediction made, and the work
done in a process of its own, which may be killed when its time is up.
"""
