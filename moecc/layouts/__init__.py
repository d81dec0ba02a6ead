"""Layouts: rules that say on which axes of a mesh the named axes of a model lie."""
