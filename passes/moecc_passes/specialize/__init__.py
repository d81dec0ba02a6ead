"""A model as it trains or as it is used: capacity, policy, noise, by a pass and not at run time."""
