"""One sharding: how the axes of values are split over a mesh, and what is sent for that.

`rules` reads layouts; `assign` gives mesh axes to the dimensions of one operation; `propagate`
walks a graph with it; `collectives` has what brings a value from one sharding to another,
`routes` how rows reach their experts, and `gradients` what the backward pass sends.  Passes, the
plan and the XLA backend read these, and have no rules of their own.
"""
