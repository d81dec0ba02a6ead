"""Layouts: rules that map the named axes of a model to the axes of a mesh."""
