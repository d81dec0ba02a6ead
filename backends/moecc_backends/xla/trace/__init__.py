"""What a lowering works with: values, the context of a trace, options, the view of one device."""
